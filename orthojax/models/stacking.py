"""Variables of a scanned net to those of an unrolled one, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_PREFIX = "block_"
_SCANNED = "scanned"


def unstack_blocks(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a net with `scan=True` as those of its twin with `scan=False`.

    Every subtree `scanned`, whose leaves have a leading axis of length k, becomes `block_0` to
    `block_{k-1}`. Works on any collection, on gradients and on optimizer moments laid out alike.

    Example:
      >>> unstack_blocks({"scanned": {"bias": jnp.arange(2)}})["block_1"]["bias"]
      Array(1, dtype=int32)
    """
    result: dict[str, Any] = {}
    for name, value in variables.items():
        if name == _SCANNED:
            length = jax.tree.leaves(value)[0].shape[0]
            for index in range(length):
                result[f"{_PREFIX}{index}"] = jax.tree.map(lambda leaf, i=index: leaf[i], value)
        else:
            result[name] = unstack_blocks(value) if isinstance(value, Mapping) else value
    return result


def stack_blocks(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `unstack_blocks`: `block_0`, `block_1`, ... become one `scanned`.

    Example:
      >>> tree = {"block_0": {"bias": jnp.zeros(3)}, "block_1": {"bias": jnp.ones(3)}}
      >>> stack_blocks(tree)["scanned"]["bias"].shape
      (2, 3)
    """
    result: dict[str, Any] = {}
    blocks = {}
    for name, value in variables.items():
        if name.startswith(_PREFIX):
            blocks[int(name.removeprefix(_PREFIX))] = value
        else:
            result[name] = stack_blocks(value) if isinstance(value, Mapping) else value
    if blocks:
        ordered = [blocks[index] for index in sorted(blocks)]
        result[_SCANNED] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
    return result
