"""From parameters to paths, and from `mask` and `view` arguments to what they say of each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orthojax import checks
from orthojax.errors import ConfigError
from orthojax.matrices import KernelAxes
from orthojax.ortho import views
from orthojax.tree_paths import look_up_tree

EMPTY = "no elements"  # the reason of a kernel without rows or without columns


def resolve_view(view: Any, params: Any) -> Callable[[str], Any]:
    """A function from a path to what the view says of the parameter there.

    Args:
      view: A tree, a function from the parameters to one, or `None` for `views.flax()`.
      params: Parameter tree.

    Raises:
      ConfigError: The view is a string, a number, an array or a function that returns a function;
        at call time, it says nothing about a parameter.
    """
    check_mask_and_view(None, view)
    if view is None:
        view = views.flax()
    if _is_function(view):
        tree = view(params)
        if _is_function(tree):
            raise ConfigError(
                f"the view returned the function {tree!r} for the parameters, not a tree: was it"
                " to be called first, as views.flax() is?"
            )
    else:
        tree = view
    check_mask_and_view(None, tree)
    return look_up_tree("view", tree, lambda x: isinstance(x, KernelAxes))


def resolve_mask(mask: Any, params: Any) -> Callable[[str], bool]:
    """A function from a path to whether the mask lets the parameter there be penalized.

    Args:
      mask: As in optax: a tree of booleans with the structure of the parameters or a prefix of it,
        a function from the parameters to one, or `None` for all. A tree that can be called, such
        as an Equinox model of booleans, is a tree: its leaves are no functions.
      params: Parameter tree.

    Raises:
      ConfigError: At once or at call time: what the mask holds is no boolean, or it says nothing
        about a parameter.
    """
    check_mask_and_view(mask, None)
    if mask is None:
        return lambda path: True
    tree = mask(params) if _is_function(mask) else mask
    look_up = look_up_tree("mask", tree)

    def chosen(path: str) -> bool:
        value = look_up(path)
        if isinstance(value, jax.core.Tracer):
            raise ConfigError(
                f"the mask of parameter {path!r} is traced, not a boolean{views.INJECTED}"
            )
        boolean = isinstance(value, bool | int | np.bool_ | np.ndarray | jax.Array)
        if not boolean or np.ndim(value) or np.asarray(value) not in (0, 1):
            raise ConfigError(f"the mask of parameter {path!r} is {value!r}, not True or False")
        return bool(value)

    return chosen


def check_mask_and_view(mask: Any, view: Any) -> None:
    """What neither can be, whatever the parameters are.

    Raises:
      ConfigError: The mask is a number (or one boolean for all, which is what `inject_hyperparams`
        makes of a function), a string or an array; or so is the view, or was not called.
    """
    for name, value, expected in (
        ("mask", mask, "a tree of booleans, or a function from the parameters to one"),
        ("view", view, "a tree of KernelAxes, or a function to one, such as views.flax()"),
    ):
        alone = value is not None and jax.tree_util.all_leaves([value])
        if alone and not callable(value) and not isinstance(value, KernelAxes):
            way_out = "" if isinstance(value, str) else views.INJECTED
            raise checks.refuse(name, value, expected + way_out)
    if any(view is ready_made for ready_made in (views.flax, views.haiku, views.equinox)):
        raise ConfigError(f"the view was not called: write views.{view.__name__}()")


def _is_function(tree) -> bool:
    """Whether this is a function and not a tree, by optax's rule: every leaf can be called."""
    leaves = jax.tree.leaves(tree)
    return bool(leaves) and all(map(callable, leaves))


def axes_or_reason(
    axes_of: Callable[[str], Any], path: str, array
) -> KernelAxes | str | ConfigError:
    """What the view says of one array, checked against its shape and dtype.

    Returns:
      The axes, counted from the front; or why the array is no kernel; or the error that treating
      it as a kernel is, with its path and shape.

    Raises:
      ConfigError: The view, a tree, has nothing at this path.
    """
    if not jnp.issubdtype(array.dtype, jnp.inexact):
        return f"dtype {array.dtype}"
    axes = axes_of(path)
    if axes is None:
        return "left out by the view"
    if isinstance(axes, str | ConfigError):
        return axes
    where = f"parameter {path!r} of shape {tuple(array.shape)}"
    if not isinstance(axes, KernelAxes):
        return ConfigError(f"{where}: the view says {axes!r}, not KernelAxes, a reason or None")
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        return ConfigError(f"{where} is complex; leave it out by `mask` or by the view")
    try:
        axes = axes.normalized(len(array.shape))
        axes.matrix_shape(tuple(array.shape))
    except ConfigError as error:
        return ConfigError(f"{where}: {error}; say its axes in `view`")
    return EMPTY if 0 in array.shape else axes
