"""Finding the kernels in a parameter tree and working on all of one shape at once."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from orthojax import checks
from orthojax.errors import ConfigError
from orthojax.matrices import (
    GROUPINGS,
    KernelAxes,
    accumulation_dtype,
    from_blocks,
    group_sizes,
    to_blocks,
    valid_columns,
)
from orthojax.ortho.resolution import (
    EMPTY,
    axes_or_reason,
    check_mask_and_view,
    resolve_mask,
    resolve_view,
)
from orthojax.tree_paths import leaves_with_paths

# Kernels of more elements keep a device busy by themselves; copying them into a batch costs more
# than the launch it saves.
LARGEST_BATCHED = 2**20


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One penalized parameter: its place in the tree, its axes, how its columns are grouped."""

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

    @property
    def block_shape(self) -> tuple[int, ...]:
        """`(*inputs, n)`: shape of a block, and of those that it may be batched with."""
        return (*(self.shape[axis] for axis in self.axes.inputs), max(self.groups))

    def identity(self, dtype) -> jax.Array:
        """The target of `WᵀW`: zero on the diagonal where a column is padding.

        Shape `(blocks, n, n)`, or `(1, n, n)` if no column of any block is padding.
        """
        eye = jnp.eye(max(self.groups), dtype=dtype)[None]
        if min(self.groups) == max(self.groups):
            return eye
        valid = valid_columns(self.shape, self.axes, self.grouping)
        return jnp.where(valid[:, :, None], eye, jnp.zeros_like(eye))


def check_selection(mask: Any, view: Any, grouping: str) -> None:
    """Of the arguments that choose kernels, what is wrong whatever the parameters are.

    Raises:
      ConfigError: An unknown grouping; an invalid mask or view.
    """
    checks.choice("grouping", grouping, GROUPINGS)
    check_mask_and_view(mask, view)


def penalized(params: Any, mask: Any, view: Any, grouping: str) -> list[tuple[jax.Array, Kernel]]:
    """The kernels among the parameters, with their arrays; arguments and errors: `find_kernels`."""
    found = []
    for _, array, kernel in find_kernels(params, mask, view, grouping):
        if isinstance(kernel, ConfigError):
            raise ConfigError(*kernel.args)  # a view may keep its questions, and no traceback
        if isinstance(kernel, Kernel):
            found.append((array, kernel))
    return found


def penalized_or_refuse(
    params: Any, mask: Any, view: Any, grouping: str
) -> list[tuple[jax.Array, Kernel]]:
    """Those of `penalized`; none at all is an error: a penalty of nothing is a mistake.

    Kernels without elements and trees without arrays (what `optax.multi_transform` may leave) pass.

    Raises:
      ConfigError: As `find_kernels`, or there are arrays and none of them is a kernel.
    """
    kernels = penalized(params, mask, view, grouping)
    if kernels:
        return kernels
    found = [
        (path, kernel)
        for path, array, kernel in find_kernels(params, mask, view, grouping)
        if hasattr(array, "shape")  # an array
    ]
    if not found or any(reason == EMPTY for _, reason in found):
        return []
    if found[0][0] == "":
        hint = (
            "`params` is one array; if `optax.flatten` made it, put this transformation outside of"
            " it"
        )
    else:
        examples = [f"{path!r} ({reason})" for path, reason in found[:3]]
        hint = f"{', '.join(examples)}{', …' if len(found) > 3 else ''}"
    raise ConfigError(
        f"there is nothing to penalize: none of these parameters is a kernel: {hint}."
        " `orthojax.describe(params)` lists them all with the reasons; `view` says which are"
        " kernels and what their axes are"
    )


def find_kernels(
    params: Any, mask: Any, view: Any, grouping: str
) -> list[tuple[str, Any, "Kernel | str | ConfigError"]]:
    """`(path, array, kernel)` of every leaf, `None` leaves included.

    Instead of the kernel stands the reason why the leaf is none, or the error that using it
    would raise: the view cannot tell its axes, or says what does not fit it.

    Raises:
      ConfigError: `params` is no tree; an unknown grouping; an invalid mask or view, or one
        that says nothing about a parameter; two parameters at one path.
    """
    check_selection(mask, view, grouping)
    checks.tree("params", params)
    chosen, axes_of = resolve_mask(mask, params), resolve_view(view, params)
    found: dict[str, tuple[Any, Kernel | str | ConfigError]] = {}
    for path, array in leaves_with_paths(params):
        if path in found:
            raise ConfigError(f"two parameters are at the one path {path!r}: rename one of them")
        if array is None:
            found[path] = (None, "None")
        elif not (hasattr(array, "shape") and hasattr(array, "dtype")):
            found[path] = (array, "not an array")
        elif not chosen(path):
            found[path] = (array, "masked")
        else:
            axes = axes_or_reason(axes_of, path, array)
            kernel = (
                Kernel(path, tuple(array.shape), axes, grouping)
                if isinstance(axes, KernelAxes)
                else axes
            )
            found[path] = (array, kernel)
    return [(path, *entry) for path, entry in found.items()]


def map_blocks(
    function: Callable[..., jax.Array],
    kernels: list[tuple[jax.Array, Kernel]],
    *others: list[jax.Array],
) -> list[jax.Array]:
    """`function(blocks, identity)` of every kernel; batches small ones of one shape.

    Args:
      function: Maps blocks `(b, *inputs, n)` and targets `(b, n, n)` or `(1, n, n)` to an array
        with the leading axis of the blocks. The blocks of `others` are further arguments.
      kernels: Arrays and their descriptions.
      others: Lists of further arrays, one for each kernel and of its shape, such as gradients; they
        are cast to the dtype of the kernel's blocks.

    Returns:
      The part of the result that belongs to each kernel, in order: an array of the kernel's own
      shape and sharding if the function returns blocks, of shape `(blocks,)` if it returns one
      number for each.
    """
    buckets = collections.defaultdict(list)
    for number, (array, kernel) in enumerate(kernels):
        # What is stacked already is a batch by itself: joined with another it would be copied.
        alone = number if kernel.blocks > 1 or array.size > LARGEST_BATCHED else None
        sharding = _explicit_sharding(array)
        dtype = accumulation_dtype(array.dtype)
        buckets[kernel.block_shape, dtype, sharding, alone].append(number)
    results: dict[int, jax.Array] = {}
    for (_, dtype, *_), numbers in buckets.items():
        members = [kernels[number] for number in numbers]
        parts = with_auto_axes(
            functools.partial(_map_bucket, function, dtype, [kernel for _, kernel in members]),
            [array for array, _ in members],
            *([arrays[number] for number in numbers] for arrays in others),
        )
        for number, part in zip(numbers, parts, strict=True):
            results[number] = part
    return [results[number] for number in range(len(kernels))]


def _map_bucket(function, dtype, members, *operands):
    def joined(arrays):
        parts = [to_blocks(a, k.axes, k.grouping) for a, k in zip(arrays, members, strict=True)]
        parts = [part.astype(dtype) for part in parts]
        # One member is not copied.
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    blocks, *others = map(joined, operands)
    result = function(blocks, _identity(members, dtype), *others)
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


def with_auto_axes(function, arrays, *others):
    """`function(arrays, *others)`, also on a mesh whose axes are explicit.

    There every product would have to say how its result is sharded. The kernels' own sharding, one
    for all, is all that matters here; what is between is better left to the compiler. What is not
    of a kernel's shape is small and comes back replicated.
    """
    own = _explicit_sharding(arrays[0])
    if own is None:
        return function(arrays, *others)
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (arrays, *others))
    shapes, whole = {array.shape for array in arrays}, NamedSharding(own.mesh, PartitionSpec())
    outputs = jax.tree.map(
        lambda output: own if output.shape in shapes else whole, jax.eval_shape(function, *plain)
    )
    return jax.sharding.auto_axes(function, out_sharding=outputs)(arrays, *others)


def _identity(members, dtype):
    """The targets of the members' blocks one after another, or one for all where none is padded."""
    parts = [kernel.identity(dtype) for kernel in members]
    if all(len(part) == 1 for part in parts):
        return parts[0]
    whole = [
        jnp.broadcast_to(part, (kernel.blocks, *part.shape[1:]))
        for part, kernel in zip(parts, members, strict=True)
    ]
    return jnp.concatenate(whole)
