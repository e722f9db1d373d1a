"""Finding the kernels in a parameter tree and working on all of one shape at once."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from orthojax.errors import ConfigError
from orthojax.matrices import (
    KernelAxes,
    accumulation_dtype,
    from_blocks,
    group_sizes,
    to_blocks,
    valid_columns,
)
from orthojax.ortho.conv import Conv
from orthojax.ortho.resolution import axes_or_reason, leaves_with_paths, look_up_tree, resolve
from orthojax.ortho.variants import (
    SRIP,
    Cosine,
    Double,
    Frobenius,
    Layout,
    MutualCoherence,
    Variant,
)

VARIANTS: dict[str, Callable[[], Variant]] = {
    "frobenius": Frobenius,
    "double": Double,
    "mutual_coherence": MutualCoherence,
    "srip": SRIP,
    "conv": Conv,
    "cosine": Cosine,
}

# Kernels of more elements keep a device busy by themselves; copying them into a batch costs more
# than the launch it saves.
LARGEST_BATCHED = 2**20


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One penalised parameter: its place in the tree, its axes, how its columns are grouped."""

    path: str
    shape: tuple[int, ...]
    axes: KernelAxes
    grouping: str

    @property
    def fan(self) -> tuple[int, int]:
        """`(f_in, f_out)` of one layer and one feature group."""
        return self.axes.matrix_shape(self.shape)

    @property
    def groups(self) -> tuple[int, ...]:
        """Sizes of the column groups."""
        return group_sizes(*self.fan, self.grouping)

    @property
    def blocks(self) -> int:
        """Number of blocks: stacked layers × feature groups × column groups."""
        stack = math.prod(self.shape[axis] for axis in self.axes.stack(len(self.shape)))
        return stack * self.axes.feature_groups * len(self.groups)

    def layout(self, dtype) -> Layout:
        """What blocks of this kernel have in common with those they are batched with."""
        return Layout(
            inputs=tuple(self.shape[axis] for axis in self.axes.inputs),
            columns=max(self.groups),
            dtype=accumulation_dtype(dtype),
            spatial=tuple(self.axes.inputs.index(axis) for axis in self.axes.spatial),
            strides=tuple(self.axes.strides),
        )

    def identity(self, dtype) -> np.ndarray:
        """The target of `WᵀW`, `(blocks, n, n)`: zero on the diagonal where a column is padding."""
        valid = valid_columns(self.shape, self.axes, self.grouping)
        return (valid[:, :, None] * np.eye(valid.shape[1])).astype(dtype)


def variant_named(variant: str | Variant) -> Variant:
    """The variant of this name, or the object itself.

    Raises:
      ConfigError: An unknown name.

    Example:
      >>> variant_named("cosine")
      Cosine(grouped=True)
    """
    if not isinstance(variant, str):
        return variant
    if variant not in VARIANTS:
        raise ConfigError(f"variant={variant!r} is unknown: choose one of {tuple(VARIANTS)}")
    return VARIANTS[variant]()


def penalised(
    params: Any, mask: Any, view: Any, grouping: str, grouped: bool = True
) -> list[tuple[jax.Array, Kernel]]:
    """The kernels among the parameters, with their arrays; arguments and errors: `find_kernels`."""
    found = find_kernels(params, mask, view, grouping, grouped)
    return [(array, kernel) for _, array, kernel in found if isinstance(kernel, Kernel)]


def find_kernels(
    params: Any, mask: Any, view: Any, grouping: str, grouped: bool = True
) -> Iterator[tuple[str, Any, Kernel | str]]:
    """`(path, array, Kernel or the reason why it is none)` of every leaf, `None` leaves included.

    Raises:
      ConfigError: A view or mask that does not fit a parameter; the message names the path.
    """
    group_sizes(1, 1, grouping)
    view = resolve(view)
    chosen = look_up_tree("mask", mask(params) if callable(mask) else mask)
    for path, array in leaves_with_paths(params):
        if array is None:
            yield path, None, "None"
        elif mask is not None and not chosen(path):
            yield path, array, "masked"
        else:
            axes = axes_or_reason(view, path, array)
            if isinstance(axes, str):
                yield path, array, axes
            else:
                shape = tuple(array.shape)
                yield path, array, Kernel(path, shape, axes, grouping if grouped else "none")


def map_blocks(
    function: Callable[[jax.Array, jax.Array, Layout], jax.Array],
    kernels: list[tuple[jax.Array, Kernel]],
    batched: bool = True,
) -> list[jax.Array]:
    """`function(blocks, identity, layout)` of every kernel, called once for the small of a layout.

    Args:
      function: Maps blocks `(b, *inputs, n)`, targets `(b, n, n)` or `(1, n, n)`, and their layout
        to an array with the leading axis of the blocks.
      kernels: Arrays and their descriptions.
      batched: `False` calls the function for every kernel by itself.

    Returns:
      The part of the result that belongs to each kernel, in order: an array of the kernel's own
      shape and sharding if the function returns blocks, of shape `(blocks,)` if it returns one
      number for each.
    """
    buckets = collections.defaultdict(list)
    for number, (array, kernel) in enumerate(kernels):
        # What is stacked already is a batch by itself: joined with another it would be copied.
        whole = kernel.blocks > 1 or array.size > LARGEST_BATCHED
        alone = number if whole or not batched else None
        sharding = _explicit_sharding(array)
        buckets[kernel.layout(array.dtype), sharding, alone].append(number)
    results = [None] * len(kernels)
    for (layout, *_), numbers in buckets.items():
        members = [kernels[number] for number in numbers]
        parts = _with_auto_axes(
            functools.partial(_map_bucket, function, layout, [kernel for _, kernel in members]),
            [array for array, _ in members],
        )
        for number, part in zip(numbers, parts, strict=True):
            results[number] = part
    return results


def _map_bucket(function, layout, members, arrays):
    parts = [to_blocks(a, k.axes, k.grouping) for a, k in zip(arrays, members, strict=True)]
    identity = _shared([kernel.identity(layout.dtype) for kernel in members])
    # One member is not copied.
    blocks = jnp.concatenate(parts) if len(parts) > 1 else parts[0]
    result = function(blocks, identity, layout)
    ends = np.cumsum([kernel.blocks for kernel in members])
    parts = jnp.split(result, ends[:-1])
    if result.shape != blocks.shape:
        return parts
    return [
        from_blocks(part, kernel.shape, kernel.axes, kernel.grouping)
        for part, kernel in zip(parts, members, strict=True)
    ]


def _explicit_sharding(array):
    """The sharding on a mesh with explicit axes; `None` on others: tracing does not know it."""
    sharding = jax.typeof(array).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def _with_auto_axes(function, arrays):
    """`function(arrays)`, also on a mesh whose axes are explicit.

    There every product would have to say how its result is sharded. The kernels' own sharding is
    all that matters here; what is between is better left to the compiler. What is not of a kernel's
    shape is small and comes back replicated.
    """
    shardings = [_explicit_sharding(array) for array in arrays]
    if None in shardings:
        return function(arrays)
    plain = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    outputs = [
        own if output.shape == array.shape else NamedSharding(own.mesh, PartitionSpec())
        for own, array, output in zip(
            shardings, arrays, jax.eval_shape(function, plain), strict=True
        )
    ]
    return jax.sharding.auto_axes(function, out_sharding=outputs)(arrays)


def _shared(identities):
    """One identity if all are the same (no padding anywhere): a constant of the program less."""
    first = identities[0][:1]
    if all((identity == first).all() for identity in identities):
        return jnp.asarray(first)
    return jnp.asarray(np.concatenate(identities))
