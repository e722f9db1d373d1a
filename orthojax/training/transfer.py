"""Fine-tuning: a run that begins with what another one has learned."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from orthojax.errors import WorkdirError
from orthojax.ortho.paths import path_name
from orthojax.sites import is_site
from orthojax.training.state import TrainState
from orthojax.training.trained import Trained

HEAD = "head"  # the module of our own nets that gives the logits


def take_over(
    state: TrainState, source: Trained, class_names: Sequence[str]
) -> tuple[TrainState, str]:
    """Puts the weights and BN statistics of a trained net in the place of fresh ones.

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
    same = tuple(class_names) == source.class_names
    fresh: set[str] = set()
    params = _taken(state.params, source.variables["params"], source, same, class_names, fresh)
    statistics = state.batch_stats
    if statistics:
        given = source.variables.get("batch_stats", {})
        statistics = _taken(statistics, given, source, True, class_names, fresh)
    head = "the head is kept"
    if fresh:
        classes = f"{len(class_names)} classes here, {len(source.class_names)} there"
        head = f"{' and '.join(sorted(fresh))} fresh ({classes})"
    told = f"{head}; BN statistics kept; optimizer and modulation sites fresh"
    return state.replace(params=params, batch_stats=statistics), told


def _taken(
    target: Any,
    given: Mapping[str, Any],
    source: Trained,
    same_classes: bool,
    class_names: Sequence[str],
    fresh: set[str],
) -> Any:
    found = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(given)}
    counts = len(class_names), len(source.class_names)

    def take(path, leaf):
        name = path_name(path)
        if is_site(path):
            return leaf
        there = found.get(name)
        if not same_classes and _of_logits(name, leaf, there, counts):
            fresh.add(name)
            return leaf
        if there is None or there.shape != leaf.shape:
            what = "is absent" if there is None else f"is {list(there.shape)}"
            raise WorkdirError(
                f"`init_from`: parameter {name} {what} in that run, and {list(leaf.shape)} here; "
                "give this run the model of the other"
            )
        return jax.device_put(there.astype(leaf.dtype), leaf.sharding)

    return jax.tree_util.tree_map_with_path(take, target)


def _of_logits(name: str, leaf: Any, there: Any, counts: tuple[int, int]) -> bool:
    """Whether a parameter belongs to the classes: of our head, or of somebody's by its shape."""
    if name.split("/")[0] == HEAD:
        return True
    return (
        there is not None
        and leaf.shape != there.shape
        and leaf.shape[:-1] == there.shape[:-1]
        and (leaf.shape[-1], there.shape[-1]) == counts
    )
