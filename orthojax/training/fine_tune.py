"""Fine-tuning: a run that begins with what another one has learned."""

from collections.abc import Sequence
from typing import Any

import jax

from orthojax.errors import WorkdirError
from orthojax.sites import is_site
from orthojax.training.experiment import Settings, net_of
from orthojax.training.restore import Trained
from orthojax.training.state import TrainState
from orthojax.tree_paths import path_name

HEAD = "head"  # the module of our own nets that gives the logits


def take_over(
    state: TrainState, source: Trained, class_names: Sequence[str]
) -> tuple[TrainState, str]:
    """Replaces fresh weights and BN statistics by those of a trained net.

    The head stays fresh where the classes differ, and so do modulation sites and the state of the
    optimizer.

    Args:
      state: of the run that begins.
      source: the trained net.
      class_names: of the data set that the run is trained on.

    Returns:
      The state, with the shardings that it had, and a sentence on what is fresh.

    Raises:
      WorkdirError: the nets differ elsewhere; the message names the parameter.
    """
    taken, fresh = {}, set()
    for name, target in _parts(state):
        there, new = _matched(target, source, name, class_names)
        taken[name] = jax.tree_util.tree_map_with_path(
            lambda path, leaf, there=there: _in_place(leaf, there.get(path_name(path))), target
        )
        fresh |= new
    head = "the head is kept"
    if fresh:
        classes = f"{len(class_names)} classes here, {len(source.class_names)} there"
        head = f"{' and '.join(sorted(fresh))} fresh ({classes})"
    told = f"{head}; BN statistics kept; optimizer and modulation sites fresh"
    return state.replace(**taken), told


def check_fits(state: TrainState, source: Trained, class_names: Sequence[str]) -> None:
    """Raises what `take_over` would; the state may be an abstract one."""
    for name, target in _parts(state):
        _matched(target, source, name, class_names)


def check_model(settings: Settings, source: Trained) -> None:
    """Raises what `take_over` would of any data set, before there is one.

    The nets are compared as for the images and the number of classes of the other run.
    """
    net = net_of(settings, len(source.class_names), modulated=False)
    images = jax.ShapeDtypeStruct((1, *source.preprocessing.image_shape), "float32")
    shapes = jax.eval_shape(
        lambda key, images: net.init(key, images, train=False), jax.random.key(0), images
    )
    for name, target in shapes.items():
        _matched(target, source, name, None)


def _parts(state: TrainState) -> list[tuple[str, Any]]:
    parts = [("params", state.params), ("batch_stats", state.batch_stats)]
    return [(name, part) for name, part in parts if part]


def _matched(
    target: Any, source: Trained, part: str, class_names: Sequence[str] | None
) -> tuple[dict[str, Any], set[str]]:
    """What replaces the leaves of `target`, by name, and the names of those that stay fresh.

    Without class names, those of the source are not known to be the same, nor how many there are.
    """
    given = source.variables.get(part, {})
    found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(given)}
    same = class_names is not None and tuple(class_names) == source.class_names
    counts = class_names and len(class_names), len(source.class_names)
    matched, fresh = {}, set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(target):
        name = path_name(path)
        there = found.get(name)
        if is_site(path):
            continue
        if part == "params" and not same and _of_logits(name, leaf, there, counts):
            fresh.add(name)
        elif there is None or there.shape != leaf.shape:
            what = "is absent" if there is None else f"is {list(there.shape)}"
            raise WorkdirError(
                f"`init_from`: parameter {name} {what} in that run, and {list(leaf.shape)} here; "
                "give this run the model of the other"
            )
        else:
            matched[name] = there
    return matched, fresh


def _in_place(leaf: Any, there: Any) -> Any:
    return leaf if there is None else jax.device_put(there.astype(leaf.dtype), leaf.sharding)


def _of_logits(name: str, leaf: Any, there: Any, counts: tuple[int | None, int]) -> bool:
    """Whether a parameter belongs to the classes: of our head, or of somebody's by its shape."""
    if name.split("/")[0] == HEAD:
        return True
    here, others = counts
    return (
        there is not None
        and leaf.shape != there.shape
        and leaf.shape[:-1] == there.shape[:-1]
        and leaf.shape[-1] == (here or leaf.shape[-1])
        and there.shape[-1] == others
    )
