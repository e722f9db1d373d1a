"""Kernels as matrices: which axes are input, output and stack, column groups, and Gram products.

Orthonormality is a property of a matrix `W` of shape `(f_in, f_out)`. A kernel is an array of any
rank, so something has to say how one becomes the other. `KernelAxes` says it; `to_blocks` and
`from_blocks` do it. What comes out are *blocks*, an array of shape `(blocks, *inputs, columns)`:
one block for every stacked layer, every feature group and every column group, each of which is
to be orthonormal by itself. The input axes stay apart (they are contracted together, never
merged), so that a kernel which is sharded over one of them stays sharded.
"""

import dataclasses
import math
import numbers
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from orthojax import checks
from orthojax.errors import ConfigError

GROUPINGS = ("ceil", "literal", "none")
_MOST_AXES = 64  # NumPy's


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """Dimension numbers of one kernel: the axes that make the rows and the columns of its matrix.

    Axes named neither as input nor as output are stack axes: independent layers side by side, as
    `flax.linen.scan` and `jax.vmap` make them. Negative axes count from the end.

    Attributes:
      inputs: Axes whose product is `f_in`, in the order in which they are flattened; or one axis.
      outputs: Axes whose product is `f_out`; or one axis.
      spatial: Those of `inputs` along which a convolution window slides; `scale_by_soap` may give
        them a basis of their own.
      feature_groups: `feature_group_count` of a grouped convolution; the outputs are cut into that
        many blocks, which read disjoint inputs and are therefore orthogonal to each other already.

    Raises:
      ConfigError: Axes that are no integers; groups that are not positive.

    Example:
      >>> KernelAxes(inputs=(0, 1, 2), outputs=(3,), spatial=(0, 1)).matrix_shape((3, 3, 16, 32))
      (144, 32)
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    spatial: tuple[int, ...] = ()
    feature_groups: int = 1

    def __post_init__(self):
        for name in ("inputs", "outputs", "spatial"):
            axes = getattr(self, name)
            axes = (axes,) if isinstance(axes, numbers.Integral) else axes
            expected = "an axis or a tuple of axes, such as (0, 1)"
            axes = checks.integers(name, axes, -_MOST_AXES, expected, high=_MOST_AXES)
            object.__setattr__(self, name, axes)
        groups = checks.integer("feature_groups", self.feature_groups, 1)
        object.__setattr__(self, "feature_groups", groups)

    def normalized(self, ndim: int) -> "KernelAxes":
        """These axes with every number non-negative, checked against an array of rank `ndim`.

        Raises:
          ConfigError: An axis is out of range or named twice, or there is none of either kind.
        """
        every = self.inputs + self.outputs + self.spatial
        if any(not -ndim <= axis < ndim for axis in every):
            raise ConfigError(f"{self} names an axis that an array of rank {ndim} does not have")
        found = self.at(range(ndim))
        named = found.inputs + found.outputs
        if len(set(named)) != len(named) or not set(found.spatial) <= set(found.inputs):
            raise ConfigError(f"{self}: every axis once, and `spatial` among `inputs`")
        if not self.outputs or not self.inputs:
            raise ConfigError(f"{self}: at least one input and one output axis are needed")
        return found

    def at(self, places: Sequence[int]) -> "KernelAxes":
        """The same axes of an array in which axis `i` is at `places[i]`.

        Example:
          >>> KernelAxes(inputs=(0,), outputs=(1,)).at((-3, -1))
          KernelAxes(inputs=(-3,), outputs=(-1,), spatial=(), feature_groups=1)
        """
        inputs, outputs, spatial = (
            tuple(places[axis] for axis in axes)
            for axes in (self.inputs, self.outputs, self.spatial)
        )
        return dataclasses.replace(self, inputs=inputs, outputs=outputs, spatial=spatial)

    def stack(self, ndim: int) -> tuple[int, ...]:
        """The stack axes of an array of rank `ndim`, ascending."""
        axes = self.normalized(ndim)
        return tuple(axis for axis in range(ndim) if axis not in axes.inputs + axes.outputs)

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """`(f_in, f_out)` of one stacked layer and one feature group of a kernel of this shape.

        Raises:
          ConfigError: The outputs cannot be cut into `feature_groups` equal blocks.
        """
        axes = self.normalized(len(shape))
        fan_in = math.prod(shape[axis] for axis in axes.inputs)
        fan_out = math.prod(shape[axis] for axis in axes.outputs)
        if fan_out % self.feature_groups:
            raise ConfigError(
                f"{fan_out} outputs of a kernel of shape {tuple(shape)} cannot be cut into"
                f" feature_groups={self.feature_groups} equal blocks"
            )
        return fan_in, fan_out // self.feature_groups


def default_axes(ndim: int, stacked: int = 0) -> KernelAxes:
    """The axes of a Flax or JAX kernel: `stacked` leading axes, inputs, and the output last.

    All inputs but the last are taken for the window of a convolution.

    Raises:
      ConfigError: Fewer than two axes are left for a matrix.

    Example:
      >>> default_axes(4)
      KernelAxes(inputs=(0, 1, 2), outputs=(3,), spatial=(0, 1), feature_groups=1)
    """
    checks.integer("stacked", stacked, 0)
    checks.integer("ndim", ndim, stacked + 2)
    return KernelAxes(
        inputs=tuple(range(stacked, ndim - 1)),
        outputs=(ndim - 1,),
        spatial=tuple(range(stacked, ndim - 2)),
    )


def group_sizes(fan_in: int, fan_out: int, grouping: str = "ceil") -> tuple[int, ...]:
    """How many columns each group has; the groups are consecutive.

    At most `fan_in` vectors of length `fan_in` can be orthonormal. With `fan_out` > `fan_in` the
    columns are therefore made orthonormal group by group (section 4 of the paper):

    - `"ceil"`: `ceil(fan_out / fan_in)` groups, whole groups of `fan_in` and then the rest.
    - `"literal"`: the paper's count read to the letter, `fan_out // fan_in + fan_out % fan_in`:
      whole groups of `fan_in`, then each remaining column by itself.
    - `"none"`: one group; `WᵀW = I` is then out of reach by `fan_out − fan_in` (squared norm).

    Raises:
      ConfigError: An unknown grouping, or a number that is not positive.

    Example:
      >>> group_sizes(27, 64), len(group_sizes(27, 64, "literal")), group_sizes(27, 64, "none")
      ((27, 27, 10), 12, (64,))
    """
    checks.integer("fan_in", fan_in, 1)
    checks.integer("fan_out", fan_out, 1)
    checks.choice("grouping", grouping, GROUPINGS)
    if fan_in >= fan_out or grouping == "none":
        return (fan_out,)
    whole, rest = divmod(fan_out, fan_in)
    tail = (1,) * rest if grouping == "literal" else (rest,) * bool(rest)
    return (fan_in,) * whole + tail


def accumulation_dtype(dtype) -> jnp.dtype:
    """The dtype of Gram products of parameters of this dtype: float32, or float64 if that is it.

    (And if it is enabled: a NumPy array of float64 is a float32 one to JAX, unless told otherwise.)

    Raises:
      ConfigError: It is no floating dtype.

    Example:
      >>> accumulation_dtype("bfloat16")
      dtype('float32')
    """
    wide = checks.dtype("dtype", dtype) == jnp.float64
    return jnp.dtype(jnp.float64 if wide else jnp.float32)


def to_blocks(kernel: jax.Array, axes: KernelAxes, grouping: str = "none") -> jax.Array:
    """The matrices in a kernel, as an array of shape `(blocks, *inputs, columns)`.

    Args:
      kernel: Array of any rank >= 2 and any floating dtype.
      axes: Which of its axes are which.
      grouping: See `group_sizes`. Where the groups have different sizes, the smaller ones are
        filled up with zero columns; `valid_columns` tells them apart.

    Returns:
      The blocks in `accumulation_dtype(kernel.dtype)`. The order of blocks is stack (row-major),
      feature group, column group.

    Raises:
      ConfigError: `kernel` is no floating array, has none of the axes, or an axis without elements;
        an unknown grouping.

    Example:
      >>> import jax.numpy as jnp
      >>> to_blocks(jnp.ones((3, 3, 3, 64)), default_axes(4), "ceil").shape
      (3, 3, 3, 3, 27)
    """
    kernel = checks.array("kernel", kernel, 2)
    _, fan_out, sizes = _sizes(kernel.shape, axes, grouping)
    stack, inputs, _ = _ordered_shape(kernel.shape, axes)
    kernel = kernel.astype(accumulation_dtype(kernel.dtype))
    kernel = kernel.transpose(_order(kernel.ndim, axes))
    if axes.feature_groups == 1 and len(sizes) == 1:
        return kernel.reshape((stack, *inputs, fan_out))
    # Split the outputs into groups, pad short ones, bring the groups to the front.
    kernel = kernel.reshape((stack, *inputs, axes.feature_groups, fan_out))
    kernel = _pad_groups(kernel, sizes)
    kernel = jnp.moveaxis(kernel, (-3, -2), (1, 2))
    return kernel.reshape((-1, *inputs, max(sizes)))


def from_blocks(
    blocks: jax.Array, shape: tuple[int, ...], axes: KernelAxes, grouping: str = "none"
) -> jax.Array:
    """The kernel of the given shape that `to_blocks` turned into these blocks (dtype unchanged).

    Raises:
      ConfigError: `blocks` are not those of such a kernel; otherwise as `to_blocks`.

    Example:
      >>> kernel = jnp.arange(20.0).reshape(2, 10)
      >>> blocks = to_blocks(kernel, default_axes(2), "ceil")
      >>> bool((from_blocks(blocks, (2, 10), default_axes(2), "ceil") == kernel).all())
      True
    """
    shape = checks.shape("shape", shape)
    _, _, sizes = _sizes(shape, axes, grouping)
    stack, inputs, ordered = _ordered_shape(shape, axes)
    whole = (stack * axes.feature_groups * len(sizes), *inputs, max(sizes))
    blocks = checks.array("blocks", blocks)
    if blocks.shape != whole:
        raise checks.refuse("blocks", blocks, f"of shape {whole}, for a kernel of shape {shape}")
    if axes.feature_groups > 1 or len(sizes) > 1:
        blocks = blocks.reshape((stack, axes.feature_groups, len(sizes), *inputs, max(sizes)))
        blocks = jnp.moveaxis(blocks, (1, 2), (-3, -2))
        blocks = _unpad_groups(blocks, sizes)
    order = _order(len(shape), axes)
    inverse = tuple(sorted(range(len(shape)), key=order.__getitem__))
    return blocks.reshape(ordered).transpose(inverse)


def valid_columns(shape: tuple[int, ...], axes: KernelAxes, grouping: str = "none") -> jax.Array:
    """`(blocks, columns)`: `True` for every column of `to_blocks` from the kernel, else padding.

    Computed in the program, from the sizes alone: for a wide kernel it would be a large constant.

    Raises:
      ConfigError: As `to_blocks`.

    Example:
      >>> valid_columns((2, 3), default_axes(2), "ceil").tolist()
      [[True, True], [True, False]]
    """
    shape = checks.shape("shape", shape)
    _, _, sizes = _sizes(shape, axes, grouping)
    width, whole = max(sizes), sum(size == max(sizes) for size in sizes)
    layers = math.prod(shape[axis] for axis in axes.stack(len(shape))) * axes.feature_groups
    valid_shape = (layers, len(sizes), width)
    group, column = (jax.lax.broadcasted_iota(jnp.int32, valid_shape, axis) for axis in (1, 2))
    return ((group < whole) | (column < sizes[-1])).reshape(-1, width)


def gram(blocks: jax.Array) -> jax.Array:
    """`WᵀW` of every block: `(blocks, *inputs, n)` to `(blocks, n, n)`, at full precision.

    `Precision.HIGHEST` keeps TPUs from multiplying in bfloat16 and GPUs from TensorFloat-32, in
    which the difference to the identity would be noise.

    Raises:
      ConfigError: `blocks` are no floating array of rank 2 or more.

    Example:
      >>> gram(jnp.array([[[1.0, 2.0], [0.0, 1.0]]])).tolist()
      [[[1.0, 2.0], [2.0, 5.0]]]
    """
    blocks = checks.array("blocks", blocks, 2)
    return cross_gram(blocks, blocks)


def cross_gram(left: jax.Array, right: jax.Array) -> jax.Array:
    """`VᵀW` of every pair of blocks: twice `(blocks, *inputs, n)` to `(blocks, n, n)`.

    Raises:
      ConfigError: They are no floating arrays of rank 2 or more, alike but for the columns.

    Example:
      >>> cross_gram(jnp.array([[[1.0], [2.0]]]), jnp.array([[[3.0], [4.0]]])).tolist()
      [[[11.0]]]
    """
    left, right = checks.array("left", left, 2), checks.array("right", right, 2)
    if left.shape[:-1] != right.shape[:-1] or left.dtype != right.dtype:
        expected = f"of shape {(*left.shape[:-1], 'n')} and dtype {left.dtype}, as `left`"
        raise checks.refuse("right", right, expected)
    rows = tuple(range(1, left.ndim - 1))
    return jax.lax.dot_general(
        left, right, ((rows, rows), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
    )


def orthonormal_factor(matrices: jax.Array) -> jax.Array:
    """`Q` of `M = QR` with the diagonal of `R` not negative: `(..., rows, n)`, `rows >= n`.

    Householder QR leaves the signs of R's diagonal arbitrary; Gram-Schmidt makes them positive,
    which makes `Q` unique and continuous in `M`.

    Raises:
      ConfigError: `matrices` are no floating array with at least as many rows as columns.

    Example:
      >>> orthonormal_factor(jnp.array([[-3.0], [4.0]])).round(3).tolist()
      [[-0.6000000238418579], [0.800000011920929]]
    """
    matrices = checks.tall("matrices", matrices)
    q, r = jnp.linalg.qr(matrices)
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    return q * jnp.where(diagonal < 0, -1, 1).astype(matrices.dtype)[..., None, :]


def times(blocks: jax.Array, matrices: jax.Array) -> jax.Array:
    """`W M` of every block: `(blocks, *inputs, n)`, `(blocks, n, m)` to `(blocks, *inputs, m)`.

    Raises:
      ConfigError: They are no floating arrays whose shapes and dtypes fit together.

    Example:
      >>> times(jnp.ones((1, 3, 3, 2)), jnp.ones((1, 2, 5))).shape
      (1, 3, 3, 5)
    """
    blocks, matrices = checks.array("blocks", blocks, 2), checks.array("matrices", matrices, 3)
    wanted = (blocks.shape[0], blocks.shape[-1])
    if matrices.shape[:-1] != wanted or matrices.dtype != blocks.dtype:
        expected = f"of shape {(*wanted, 'm')} and dtype {blocks.dtype}, as `blocks` need"
        raise checks.refuse("matrices", matrices, expected)
    last = blocks.ndim - 1
    return jax.lax.dot_general(
        blocks, matrices, (((last,), (1,)), ((0,), (0,))), precision=jax.lax.Precision.HIGHEST
    )


def _sizes(shape, axes, grouping):
    """`f_in`, `f_out` and the sizes of the column groups, of a kernel of this shape."""
    if not isinstance(axes, KernelAxes):
        raise checks.refuse("axes", axes, "KernelAxes(inputs=..., outputs=...)")
    checks.choice("grouping", grouping, GROUPINGS)
    if 0 in shape:
        raise checks.refuse("shape", shape, "that of a kernel with elements")
    try:
        fan_in, fan_out = axes.matrix_shape(shape)
    except ConfigError as error:
        raise ConfigError(f"a kernel of shape={tuple(shape)}: {error}") from None
    return fan_in, fan_out, group_sizes(fan_in, fan_out, grouping)


def _order(ndim, axes):
    axes = axes.normalized(ndim)
    return axes.stack(ndim) + axes.inputs + axes.outputs


def _ordered_shape(shape, axes):
    """Number of stacked layers, the shape of the inputs, and the shape after `_order`."""
    ordered = tuple(shape[axis] for axis in _order(len(shape), axes))
    depth = len(axes.stack(len(shape)))
    return math.prod(ordered[:depth]), ordered[depth : depth + len(axes.inputs)], ordered


def _pad_groups(kernel, sizes):
    """`(..., fan_out)` to `(..., groups, max(sizes))`, short groups filled up with zeros."""
    width, whole = max(sizes), sum(size == max(sizes) for size in sizes)
    lead = kernel.shape[:-1]
    parts = [kernel[..., : whole * width].reshape((*lead, whole, width))]
    rest = kernel[..., whole * width :]
    if rest.shape[-1]:
        # All short groups have one size: the rest in one group, or one column each.
        rest = rest.reshape((*lead, len(sizes) - whole, -1))
        parts.append(jnp.pad(rest, [(0, 0)] * (rest.ndim - 1) + [(0, width - rest.shape[-1])]))
    return jnp.concatenate(parts, axis=-2)


def _unpad_groups(kernel, sizes):
    width, whole = max(sizes), sum(size == max(sizes) for size in sizes)
    lead = kernel.shape[:-2]
    parts = [kernel[..., :whole, :].reshape((*lead, whole * width))]
    if whole < len(sizes):
        parts.append(kernel[..., whole:, : sizes[-1]].reshape((*lead, -1)))
    return jnp.concatenate(parts, axis=-1)
