"""One training step and one evaluation step, as pure functions."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from orthojax.models.blocks import BN_MOMENTUM
from orthojax.sites import weights_only
from orthojax.training.state import TrainState

Metrics = dict[str, jax.Array]


def make_train_step(
    net: nn.Module,
    optimizer: optax.GradientTransformation,
    augment: Callable[[jax.Array, jax.Array], jax.Array],
    seed: int,
    gather: Callable[[Any], Any] = lambda params: params,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """The function of one update.

    Args:
      net: called as `net(images, train=True)`; it may have modulation sites, batch normalization
        and dropout.
      optimizer: any optax transformation.
      augment: `(uint8 images, key) -> float images`.
      seed: an integer or a uint32 scalar; the key of step k is `fold_in(key(seed), k)`.
      gather: applied to the parameters before the net sees them; for a mesh on which they are
        split, what brings them together.

    Returns:
      `step(state, batch) -> (state, metrics)`. Metrics are float32 scalars of the batch, before
      the update: `loss`, `accuracy`, `grad_norm`; and after it: `param_norm`. Where the state has
      a loss scale, the gradient is of the loss times that; a gradient that is not finite changes
      nothing but the scale, which is one metric more, and counts as 0.
    """

    def train_step(state: TrainState, batch: dict[str, jax.Array]):
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        images = augment(batch["image"], key)

        def loss_function(params: Any):
            variables = {"batch_stats": state.batch_stats, "params": gather(params)}
            logits, updated = net.apply(
                variables,
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(key, 1)},
            )
            return _cross_entropy(logits, batch["label"]).mean(), (logits, updated)

        if state.loss_scale is None:
            loss_scale = None
            grad_function = jax.value_and_grad(loss_function, has_aux=True)
            (loss, (logits, updated)), grads = grad_function(state.params)
        else:
            grad_function = state.loss_scale.value_and_grad(loss_function, has_aux=True)
            loss_scale, finite, (loss, (logits, updated)), grads = grad_function(state.params)
            grads = jax.tree.map(lambda g: jnp.where(finite, g, 0), grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if loss_scale is not None:
            kept = state.params, state.opt_state
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), (params, opt_state), kept
            )
        metrics = {
            "loss": loss,
            "accuracy": jnp.mean(_correct(logits, batch["label"])),
            "grad_norm": optax.tree.norm(weights_only(grads)),
            "param_norm": optax.tree.norm(weights_only(params)),
        }
        if state.loss_scale is not None:
            metrics["loss_scale"] = state.loss_scale.scale
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            batch_stats=updated.get("batch_stats", {}),
            opt_state=opt_state,
            loss_scale=loss_scale,
        )
        return new_state, metrics

    return train_step


def make_eval_step(
    net: nn.Module,
    normalize: Callable[[jax.Array], jax.Array],
    gather: Callable[[Any], Any] = lambda params: params,
) -> Callable[[TrainState, dict[str, jax.Array]], Metrics]:
    """The function that evaluates one padded batch.

    Args:
      net: called as `net(images, train=False)`.
      normalize: `uint8 images -> float images`.
      gather: see `make_train_step`.

    Returns:
      `step(state, batch) -> sums`: float32 `loss`, `correct`, `correct_top5` and `count` over the
      images whose `mask` is 1; dividing totals over all batches gives the exact figures of the
      split.
    """

    def eval_step(state: TrainState, batch: dict[str, jax.Array]) -> Metrics:
        variables = {"params": gather(state.params), "batch_stats": state.batch_stats}
        logits = net.apply(variables, normalize(batch["image"]), train=False)
        mask = batch["mask"]
        return {
            "loss": jnp.sum(_cross_entropy(logits, batch["label"]) * mask),
            "correct": jnp.sum(_correct(logits, batch["label"]) * mask),
            "correct_top5": jnp.sum(_among_top(5, logits, batch["label"]) * mask),
            "count": jnp.sum(mask),
        }

    return eval_step


def make_recalibrate(
    net: nn.Module,
    normalize: Callable[[jax.Array], jax.Array],
    gather: Callable[[Any], Any] = lambda params: params,
) -> Callable[[TrainState, jax.Array], TrainState]:
    """The function that takes BN statistics from one batch, for evaluation.

    A running average mixes batches, and each layer's statistics belong to what *that batch* was in
    the layers below. In a chaotic net the mixture belongs to nothing: it tells one image from
    another no better than chance, where statistics of one pass give the accuracy of training.

    Args:
      net: called as `net(images, train=True)`; it has `bn_groups`.
      normalize: `uint8 images -> float images`.
      gather: see `make_train_step`.

    Returns:
      `recalibrate(state, images) -> state`, with the statistics of the images instead of the
      running ones; it is for evaluation alone.
    """

    def recalibrate(state: TrainState, images: jax.Array) -> TrainState:
        variables = {"params": gather(state.params), "batch_stats": state.batch_stats}
        return state.replace(batch_stats=batch_statistics(net, variables, normalize(images)))

    return recalibrate


def batch_statistics(net: nn.Module, variables: Any, images: jax.Array) -> Any:
    """BN statistics of one batch, instead of the running ones.

    Args:
      net: called as `net(images, train=True)`; it has `bn_groups`.
      variables: `params` and `batch_stats`; of the latter the structure alone counts.
      images: float (N, H, W, C), normalized.

    Returns:
      `batch_stats`.
    """
    nothing = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    whole, given = net.clone(bn_groups=1), {**variables, "batch_stats": nothing}
    _, updated = whole.apply(given, images, train=True, mutable=["batch_stats"])
    return jax.tree.map(lambda s: s / (1 - BN_MOMENTUM), updated.get("batch_stats", {}))


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _correct(logits, labels):
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


def _among_top(count, logits, labels):
    _, best = jax.lax.top_k(logits, min(count, logits.shape[-1]))
    return jnp.any(best == labels[:, None], axis=-1).astype(jnp.float32)
