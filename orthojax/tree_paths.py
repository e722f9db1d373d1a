"""Parameters by the path to them in their tree."""

from collections.abc import Callable
from typing import Any

import jax

from orthojax.errors import ConfigError


def path_name(path) -> str:
    """A key path of `jax.tree_util` as one string: names and indices joined by `/`.

    Example:
      >>> import jax
      >>> [(path, _)] = jax.tree_util.tree_flatten_with_path({"conv": [1]})[0]
      >>> path_name(path)
      'conv/0'
    """
    # The arrays of nnx.State and of linen's boxes sit in attribute `value` of variables; nobody
    # calls them by that.
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaves_with_paths(
    tree: Any, is_leaf: Callable[[Any], bool] = lambda x: False
) -> list[tuple[str, Any]]:
    """`(path, leaf)` of every leaf, `None` included, with `/`-joined paths."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None or is_leaf(x))
    return [(path_name(path), leaf) for path, leaf in flat]


def shapes_by_path(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every array of a tree.

    Example:
      >>> shapes_by_path({"dense": {"kernel": jax.numpy.ones((2, 3)), "name": "first"}})
      {'dense/kernel': (2, 3)}
    """
    return {
        path: tuple(leaf.shape) for path, leaf in leaves_with_paths(tree) if hasattr(leaf, "shape")
    }


def look_up_tree(
    name: str, tree: Any, is_leaf: Callable[[Any], bool] = lambda x: False
) -> Callable[[str], Any]:
    """A function from a path to the leaf of the tree at that place, or at the nearest one above.

    Trees are matched to parameters by path, not by structure: that is how one tree serves the
    parameters as they are and what `optax.masked` or `optax.multi_transform` leaves of them. A flat
    dictionary from path to leaf is such a tree too.

    Raises:
      ConfigError: At call time, no leaf on the way to this path.
    """
    leaves = dict(leaves_with_paths(tree, is_leaf))

    def look_up(path: str):
        place = path
        while place not in leaves:
            if not place:
                raise ConfigError(f"the {name}, a tree, says nothing about parameter {path!r}")
            place = place.rpartition("/")[0]
        return leaves[place]

    return look_up
