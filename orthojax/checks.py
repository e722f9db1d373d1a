"""What an argument may be: checked where a public function is called, before anything is traced.

Every message says the argument, its value and what is right. Numbers may come from NumPy or JAX;
those that are traced have a shape and a dtype, but no value that could be looked at.
"""

import math
import numbers
import os
from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orthojax.errors import ConfigError

_LONGEST = 60  # characters of a value in a message
_LARGEST = 2**53  # the integers that a float holds
_MOST_ELEMENTS = 2**40


def refuse(name: str, value: Any, expected: str) -> ConfigError:
    """The error that says so; an array is shown by shape and dtype.

    Example:
      >>> refuse("decay", 2.0, "a number in [0, 1)")
      ConfigError('decay=2.0 must be a number in [0, 1)')
    """
    if hasattr(value, "shape") and hasattr(value, "dtype") and (np.ndim(value) or _traced(value)):
        shown = f" of shape {tuple(value.shape)} and dtype {value.dtype}"
    else:
        text = " ".join(repr(value).split())
        shown = "=" + (text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")
    return ConfigError(f"{name}{shown} must be {expected}")


def number(name: str, value: Any, interval: str = "(-inf, inf)", *, traced: bool = False) -> None:
    """A real number in an interval, such as "[0, 1)"; no boolean.

    Args:
      name: of the argument.
      value: its value.
      interval: two bounds; a round bracket leaves its own out.
      traced: whether it may be a traced scalar, or an array that other hosts hold a part of; it
        is to become an array, then, and must not overflow in JAX's default dtype.
    """
    expected = f"a number in {interval}" if interval != "(-inf, inf)" else "a finite number"
    if not _is_number(value, numbers.Real, jnp.floating, jnp.integer):
        raise refuse(name, value, expected)
    if _unknown(value):
        if not traced:
            raise refuse(name, value, f"{expected}, known before tracing")
        return
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    given = value.item() if hasattr(value, "item") else value
    above = given > low if interval[0] == "(" else given >= low
    below = given < high if interval[-1] == ")" else given <= high
    if not (above and below):
        raise refuse(name, value, expected)
    if traced and math.isfinite(given):
        fits(name, given, jax.dtypes.canonicalize_dtype(float))


def integer(name: str, value: Any, low: int, high: int = _LARGEST) -> int:
    """An integer from `low` to `high`, as Python's; no boolean."""
    expected = f"an integer of at least {low}" + (f" and at most {high}" if high < _LARGEST else "")
    if not _is_number(value, numbers.Integral, jnp.integer) or _unknown(value):
        raise refuse(name, value, expected)
    if not low <= int(value) <= high:
        raise refuse(name, value, expected)
    return int(value)


def integers(
    name: str,
    value: Any,
    low: int,
    expected: str,
    *,
    high: int = _LARGEST,
    lengths: Collection[int] | None = None,
) -> tuple[int, ...]:
    """A sequence of integers from `low` to `high`, as a tuple; `expected` says what it is to be."""
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype.kind in "iu":
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise refuse(name, value, expected)
    if lengths is not None and len(value) not in lengths:
        raise refuse(name, value, expected)
    for item in value:
        whole = _is_number(item, numbers.Integral, jnp.integer) and not _unknown(item)
        if not whole or not low <= item <= high:
            raise refuse(name, value, expected)
    return tuple(int(item) for item in value)


def shape(name: str, value: Any) -> tuple[int, ...]:
    """The shape of an array that a computer could hold."""
    expected = "a tuple of sizes, such as (3, 3, 16, 32)"
    sizes = integers(name, value, 0, expected)
    if math.prod(sizes) > _MOST_ELEMENTS:
        raise refuse(name, value, f"{expected}, of at most 2^40 elements")
    return sizes


def strides(name: str, value: Any) -> int | tuple[int, ...]:
    """One positive integer for all axes of a window, or one each."""
    if isinstance(value, int | np.integer):
        return integer(name, value, 1)
    return integers(name, value, 1, "a positive integer, or a tuple of them")


def flag(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise refuse(name, value, "True or False")


def choice(name: str, value: Any, choices: Collection[str]) -> None:
    """One of these names."""
    if not isinstance(value, str) or value not in choices:
        raise refuse(name, value, f"one of {', '.join(map(repr, choices))}")


def function(name: str, value: Any, expected: str) -> None:
    """Something that can be called."""
    if not callable(value):
        raise refuse(name, value, expected)


def transformation(name: str, value: Any) -> None:
    """An optax transformation, not the function that makes one."""
    if not (callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))):
        raise refuse(name, value, "an optax transformation, such as optax.sgd(0.1)")


def dtype(name: str, value: Any) -> np.dtype:
    """A floating dtype, as JAX will have it."""
    try:
        found = jax.dtypes.canonicalize_dtype(value)
    except TypeError:
        found = None
    if value is None or found is None or not jnp.issubdtype(found, jnp.floating):
        raise refuse(name, value, "a floating dtype, such as jnp.float32")
    return found


def array(name: str, value: Any, rank: int = 0, *, exactly: bool = False) -> jax.Array:
    """A floating array of at least this rank, or of exactly this one."""
    size = f"rank {rank}" if exactly else f"rank {rank} or more"
    expected = "a floating array" + (f" of {size}" if rank or exactly else "")
    try:
        found = jnp.asarray(value)
    except (TypeError, ValueError):
        raise refuse(name, value, expected) from None
    wrong = found.ndim != rank if exactly else found.ndim < rank
    if value is None or wrong or not jnp.issubdtype(found.dtype, jnp.floating):
        raise refuse(name, value, expected)
    return found


def tall(name: str, value: Any) -> jax.Array:
    """A floating array `(..., rows, columns)` with at least as many rows as columns."""
    found = array(name, value, 2)
    if found.shape[-1] > found.shape[-2]:
        raise refuse(name, value, "of at least as many rows as columns, (..., rows, columns)")
    return found


def path(name: str, value: Any) -> None:
    """A path of a file system or an object store."""
    if not isinstance(value, str | os.PathLike) or not str(value):
        raise refuse(name, value, "a path, such as 'runs/first'")


def fits(name: str, value: Any, dtype: Any) -> None:
    """A number that does not overflow in this dtype."""
    largest = float(jnp.finfo(dtype).max)
    if not _unknown(value) and abs(float(value)) > largest:
        raise refuse(name, value, f"at most {largest:.3g}, the largest number of {dtype}")


def tree(name: str, value: Any) -> None:
    """A tree of parameters: arrays in containers, not a number, a name or a function."""
    alone = value is None or jax.tree_util.all_leaves([value])
    if alone and not hasattr(value, "shape"):
        raise refuse(name, value, "a tree of arrays, such as a dictionary of parameters")


def _is_number(value, abstract, *kinds):
    if isinstance(value, bool | np.bool_):
        return False
    if isinstance(value, jax.Array | np.ndarray | np.generic):
        return value.shape == () and any(jnp.issubdtype(value.dtype, kind) for kind in kinds)
    return isinstance(value, abstract)


def _traced(value):
    return isinstance(value, jax.core.Tracer)


def _unknown(value):
    """Whether nobody here can look at it."""
    return _traced(value) or (isinstance(value, jax.Array) and not value.is_fully_addressable)
