"""From parameters to paths, and from a `view` argument to the axes of each parameter."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from orthojax.errors import ConfigError
from orthojax.matrices import KernelAxes
from orthojax.ortho.views import View, flax_linen


def resolve(view: View | Any | None) -> View:
    """The callable that a `view` argument stands for: itself, a tree looked up by path, or linen's.

    Raises:
      ConfigError: On use: the tree says nothing about a parameter.
    """
    if view is None:
        return flax_linen()
    # A tree of KernelAxes may be callable too (an Equinox module); a function is its only leaf.
    if callable(view) and jax.tree_util.all_leaves([view]):
        return view
    axes = look_up_tree("view", view, lambda x: isinstance(x, KernelAxes | str))
    return lambda path, array: axes(path)


def look_up_tree(
    name: str, tree: Any, is_leaf: Callable[[Any], bool] = lambda x: False
) -> Callable[[str], Any]:
    """A function from a path to the leaf of the tree at that place, or at the nearest one above.

    Trees are matched to parameters by path, not by structure: that is how one tree serves the
    parameters as they are and what `optax.masked` or `optax.multi_transform` leaves of them.

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


def leaves_with_paths(tree, is_leaf=lambda x: False) -> list[tuple[str, Any]]:
    """`(path, leaf)` of every leaf, `None` included, with `/`-joined paths."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is None or is_leaf(x))
    return [(path_name(path), leaf) for path, leaf in flat]


def path_name(path) -> str:
    """A key path of `jax.tree_util` as one string: names and indices joined by `/`.

    Example:
      >>> import jax
      >>> [(path, _)] = jax.tree_util.tree_flatten_with_path({"conv": [1]})[0]
      >>> path_name(path)
      'conv/0'
    """
    # The arrays of nnx.State sit in attribute `value` of variables; nobody calls them by that.
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def axes_or_reason(view: View, path: str, array) -> KernelAxes | str:
    """What the view says of one parameter, checked against its shape and dtype.

    Raises:
      ConfigError: The axes do not fit the array; the message names the parameter's path and shape.
    """
    if not (hasattr(array, "shape") and hasattr(array, "dtype")):
        return "not an array"
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return f"dtype {array.dtype}"
    axes = view(path, array)
    if axes is None:
        return "left out by the view"
    if isinstance(axes, str):
        return axes
    where = f"parameter {path!r} of shape {tuple(array.shape)}"
    if not isinstance(axes, KernelAxes):
        raise ConfigError(f"{where}: the view returned {axes!r}, not KernelAxes, a reason or None")
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ConfigError(f"{where} is complex; leave it out by `mask` or by the view")
    try:
        axes = axes.normalised(len(array.shape))
        axes.matrix_shape(tuple(array.shape))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}; say its axes in `view`") from error
    return axes
