"""The train state: everything that changes during training, and nothing else."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.dynamic_scale import DynamicScale


@flax.struct.dataclass
class TrainState:
    """What a step maps to its successor, and what a checkpoint holds.

    Attributes:
      step: int32 scalar, number of finished updates.
      params: parameters of the net, its modulation sites among them.
      batch_stats: running BN statistics.
      opt_state: state of the optax transformation, with modulation's running moments.
      loss_scale: that of a float16 net, which changes with what overflowed, or None.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    loss_scale: DynamicScale | None = None


def init_state(
    net: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    seed: int,
    *,
    loss_scale: DynamicScale | None = None,
) -> TrainState:
    """A state before the first update; pure, so it can be jitted or only shape-evaluated.

    Args:
      net: called as `net(images, train=...)`.
      optimizer: its state is made from the parameters.
      image_shape: (H, W, C).
      seed: the parameters are a function of it; an integer or a uint32 scalar.
      loss_scale: the first one, or None.
    """
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = net.init(jax.random.key(seed), images, train=False)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(variables["params"]),
        loss_scale=jax.tree.map(jnp.asarray, loss_scale),
    )
