"""Stages of equal blocks, scanned or unrolled, and the variables of one form as the other's."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from orthojax import checks
from orthojax.errors import ConfigError
from orthojax.models.blocks import BlockLayout, LayerSpec

_PREFIX = "block_"
_SCANNED = "scanned"
REMATS = ("none", "blocks", "segments")


class Stage(nn.Module):
    """n blocks at one width; the first changes the shape if there is something to change.

    A block that changes the shape is named `entry`. The others are equal in shape: `block_0`,
    `block_1`, ... when unrolled, one `scanned` with a leading axis when scanned. With `remat`
    "blocks" the backward pass computes the inside of each block again; with "segments", where
    scanned, first that of each of about √n segments of √n blocks (Chen et al. 2016,
    arXiv:1604.06174).
    """

    block: type[nn.Module]
    blocks: int
    features: int
    stride: int
    spec: LayerSpec
    layout: BlockLayout
    scan: bool
    remat: str

    def _block(self, name: str, stride: int = 1) -> nn.Module:
        return self.block(self.features, self.spec, stride, self.layout, name=name)

    @nn.compact
    def __call__(self, x, train: bool):
        def call(block, x):
            return block(x, train)

        def scanned_call(block, x, _):
            return looped(block, x), None

        again = looped = call
        if self.remat == "blocks":
            # A scan's two loops keep XLA from merging what is computed twice.
            again, looped = nn.remat(call), nn.remat(call, prevent_cse=False)
        equal = self.blocks
        channels = self.features * self.layout.expansion * self.spec.activation.copies
        if self.stride != 1 or x.shape[-1] != channels:
            x = again(self._block("entry", self.stride), x)
            equal -= 1
        if not self.scan:
            for index in range(equal):
                x = again(self._block(f"{_PREFIX}{index}"), x)
        elif equal and self.remat == "segments" and not self.is_initializing():
            x = self._segmented(x, equal, train)
        elif equal:
            scanned = nn.scan(
                scanned_call,
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=equal,
            )
            x, _ = scanned(self._block(_SCANNED), x, None)
        return x

    def _segmented(self, x, blocks: int, train: bool):
        """The scanned blocks as a scan over segments, on the same variables."""
        variables = {name: tree[_SCANNED] for name, tree in self.variables.items()}
        block = self.block(self.features, self.spec, 1, self.layout, parent=None)

        def call(x, variables):
            x, updated = block.apply(variables, x, train, mutable=["batch_stats"])
            return x, updated["batch_stats"]

        # A scan's two loops keep XLA from merging what is computed twice.
        again = functools.partial(jax.checkpoint, prevent_cse=False)
        segment = again(functools.partial(jax.lax.scan, again(call)))
        length = math.isqrt(blocks)
        whole = blocks - blocks % length

        def fold(leaf):
            return leaf[:whole].reshape(whole // length, length, *leaf.shape[1:])

        x, statistics = jax.lax.scan(segment, x, jax.tree.map(fold, variables))
        statistics = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), statistics)
        if whole < blocks:
            x, rest = segment(x, jax.tree.map(lambda leaf: leaf[whole:], variables))
            statistics = jax.tree.map(lambda *parts: jnp.concatenate(parts), statistics, rest)
        if self.is_mutable_collection("batch_stats"):
            self.put_variable("batch_stats", _SCANNED, statistics)
        return x


def unstack_blocks(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of a net with `scan=True` as those of its twin with `scan=False`.

    Every subtree `scanned`, whose leaves have a leading axis of length k, becomes `block_0` to
    `block_{k-1}`. Works on any collection, on gradients and on optimizer moments laid out alike.

    Raises:
      ConfigError: `variables` are no mapping; what is stacked has no leading axis, or several.

    Example:
      >>> unstack_blocks({"scanned": {"bias": jnp.arange(2)}})["block_1"]["bias"]
      Array(1, dtype=int32)
    """
    _check_variables(variables)
    result: dict[str, Any] = {}
    for name, value in variables.items():
        if name == _SCANNED:
            lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(value)}
            if len(lengths) != 1 or () in lengths:
                raise ConfigError(
                    f"variables: the leaves of `{_SCANNED}` have the leading axes"
                    f" {sorted(lengths)}, not one for all: they are no stack of blocks"
                )
            ((length,),) = lengths
            for index in range(length):
                result[f"{_PREFIX}{index}"] = jax.tree.map(lambda leaf, i=index: leaf[i], value)
        else:
            result[name] = unstack_blocks(value) if isinstance(value, Mapping) else value
    return result


def in_order(variables: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The leaves of any collection of a `ConvNet`, by path, from the images to the logits.

    Scanned stages are unstacked, so that there is one leaf for each layer. A projection shortcut
    stands behind the layers of its block.

    Raises:
      ConfigError: as `unstack_blocks`.

    Example:
      >>> block = {"layer_0": {"bias": 0}, "layer_1": {"bias": 1}}
      >>> tree = {"head": {"bias": 9}, "stage_1": {"block_0": block}, "stem": {"bias": 8}}
      >>> [leaf for _, leaf in in_order(tree)]
      [8, 0, 1, 9]
    """
    leaves = jax.tree_util.tree_flatten_with_path(unstack_blocks(variables))[0]
    named = [(jax.tree_util.keystr(p, simple=True, separator="/"), leaf) for p, leaf in leaves]
    return sorted(named, key=lambda item: [_place(name) for name in item[0].split("/")])


def _place(name: str) -> tuple[int, int, str]:
    kind, _, number = name.rpartition("_")
    if not number.isdigit():
        kind, number = name, "0"
    first, last = ("stem", "stage", "entry", "block", "layer"), ("shortcut", "last", "head")
    rank = (
        (first.index(kind) if kind in first else len(first))
        if kind not in last
        else 9 + last.index(kind)
    )
    return rank, int(number), name


def stack_blocks(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `unstack_blocks`: `block_0`, `block_1`, ... become one `scanned`.

    Raises:
      ConfigError: `variables` are no mapping; the blocks are not numbered from 0 up, or not alike.

    Example:
      >>> tree = {"block_0": {"bias": jnp.zeros(3)}, "block_1": {"bias": jnp.ones(3)}}
      >>> stack_blocks(tree)["scanned"]["bias"].shape
      (2, 3)
    """
    _check_variables(variables)
    result: dict[str, Any] = {}
    blocks = {}
    for name, value in variables.items():
        if name.startswith(_PREFIX) and name.removeprefix(_PREFIX).isdecimal():
            blocks[int(name.removeprefix(_PREFIX))] = value
        else:
            result[name] = stack_blocks(value) if isinstance(value, Mapping) else value
    if blocks:
        _check_blocks(blocks)
        ordered = [blocks[index] for index in range(len(blocks))]
        result[_SCANNED] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)
    return result


def _check_variables(variables):
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise checks.refuse("variables", variables, "a dictionary, such as variables['params']")


def _check_blocks(blocks):
    if sorted(blocks) != list(range(len(blocks))):
        raise ConfigError(
            f"variables: the blocks are numbered {sorted(blocks)}, which must be 0, 1, ...: one is"
            " missing"
        )
    for index, block in blocks.items():
        shapes, first = (jax.tree.map(jnp.shape, tree) for tree in (block, blocks[0]))
        if shapes != first:
            raise ConfigError(
                f"variables: {_PREFIX}{index} has the shapes {shapes}, and {_PREFIX}0 {first}:"
                " blocks that are stacked must be alike"
            )
