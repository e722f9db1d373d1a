"""Convolutions that are isometries as operators, whatever the parameters: orthogonal blocks.

A convolution multiplies the channels at every frequency `ω` by its transfer matrix
`K(ω) = Σ_x K[x] exp(-i x·ω)`, and is an isometry of periodic signals if and only if all of these
have orthonormal rows. With a symmetric projector `P` the two taps `P, I − P` have that property,

    (P + z (I − P)) (P + z̄ (I − P)) = P² + (I − P)² + (z + z̄) P (I − P) = I    for |z| = 1,

products of unitary matrices are unitary, and so is a product with a matrix `Q` of orthonormal rows.
A window of `k` taps along an axis is the product of `k − 1` such factors.

Sources: Li et al. 2019, arXiv:1911.00937 (BCOP); Xiao et al. 2018, arXiv:1806.05393 (algorithm 2);
Boissin et al. 2025, arXiv:2501.07930 (AOC: strides and groups in one kernel).
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from orthojax import checks
from orthojax.errors import ConfigError

PADDINGS = ("CIRCULAR", "SAME")
_HIGHEST = jax.lax.Precision.HIGHEST
_MOST_CHANNELS = 2**24

#: What windows and strides may be: the factors of a window are multiplied one after another.
AXES, LARGEST_WINDOW = (1, 2, 3), 1024
PER_AXIS = "integers from 1 to 1024, one for each of one to three axes"


def cayley(matrices: jax.Array) -> jax.Array:
    """Matrices with orthonormal columns from any: `(..., rows, n)`, `rows >= n`.

    With `U` the upper `n` rows, `B` the rest and `A = U − Uᵀ + BᵀB`, the result is
    `(I − A)(I + A)⁻¹` above `−2B(I + A)⁻¹`. The symmetric part of `I + A` is at least the identity,
    so that it can be inverted whatever the input. A Newton–Schulz step takes away the rounding
    error of large ones. Every matrix with orthonormal columns is reached or approximated.

    Source: Trockman and Kolter 2021, arXiv:2104.07167.

    Raises:
      ConfigError: `matrices` are no floating array with at least as many rows as columns.

    Example:
      >>> q = cayley(jnp.arange(6.0).reshape(3, 2))
      >>> bool(jnp.allclose(q.T @ q, jnp.eye(2), atol=1e-6))
      True
    """
    matrices = checks.tall("matrices", matrices)
    columns = matrices.shape[-1]
    upper, lower = matrices[..., :columns, :], matrices[..., columns:, :]
    eye = jnp.broadcast_to(jnp.eye(columns, dtype=matrices.dtype), upper.shape)
    skew = upper - jnp.swapaxes(upper, -1, -2) + _matmul(jnp.swapaxes(lower, -1, -2), lower)
    numerator = jnp.concatenate([eye - skew, -2 * lower], axis=-2)
    # X (I + A) = N, as the equation of the transposes.
    transposed = jnp.linalg.solve(jnp.swapaxes(eye + skew, -1, -2), jnp.swapaxes(numerator, -1, -2))
    factor = jnp.swapaxes(transposed, -1, -2)
    return 1.5 * factor - 0.5 * _matmul(factor, _matmul(transposed, factor))


def parameter_shapes(
    window: Sequence[int],
    inputs: int,
    outputs: int,
    strides: Sequence[int],
    feature_groups: int = 1,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the arguments `projectors` and `mixing` of `isometric_kernel`.

    Raises:
      ConfigError: The window and the strides differ in length or are not positive; nor are the
        channels and groups, or the channels cannot be cut into the groups.

    Example:
      >>> parameter_shapes((3, 3), 8, 16, (1, 1))  # four factors for a 3×3 window
      ((1, 4, 16, 8), (1, 16, 8))
    """
    window = checks.integers("window", window, 1, PER_AXIS, high=LARGEST_WINDOW, lengths=AXES)
    strides = checks.integers("strides", strides, 1, PER_AXIS, high=LARGEST_WINDOW, lengths=AXES)
    if len(window) != len(strides):
        raise ConfigError(f"window={window} and strides={strides} must have as many axes")
    for name, value in (
        ("inputs", inputs),
        ("outputs", outputs),
        ("feature_groups", feature_groups),
    ):
        checks.integer(name, value, 1, _MOST_CHANNELS)
    if inputs % feature_groups or outputs % feature_groups:
        raise ConfigError(
            f"inputs={inputs} and outputs={outputs} cannot be cut into feature_groups="
            f"{feature_groups} equal parts"
        )
    channels = inputs // feature_groups * math.prod(strides), outputs // feature_groups
    factors = sum(size - 1 for size in _reduced(window, strides))
    large, small = max(channels), min(channels)
    return (feature_groups, factors, large, large // 2), (feature_groups, large, small)


def isometric_kernel(
    projectors: jax.Array,
    mixing: jax.Array,
    window: Sequence[int],
    inputs: int,
    outputs: int,
    strides: Sequence[int],
) -> jax.Array:
    """The kernel of a convolution that is an isometry, or the adjoint of one.

    A convolution of stride `s` reads patches of `s` places along an axis as channels, so it maps
    `C·Πs` channels to `M`, with a window of `ceil(size / s)` patches: `s·ceil(size / s)` places. On
    periodic images whose sides the strides divide, its operator has

    - orthonormal columns if `C·Πs <= M`: signals keep their norm;
    - orthonormal rows if `C·Πs >= M`: it has norm 1, and cotangents keep theirs.

    Feature groups keep their channels apart, and each has the property by itself.

    Args:
      projectors: Any real array `(feature_groups, factors, large, large // 2)`, one matrix for each
        tap beyond the first, axis by axis in turn; `cayley` makes the range of a projector of it.
      mixing: Any real array `(feature_groups, large, small)`, for `Q`. `large` and `small` are the
        larger and smaller of `C·Πs` and `M` in a group; see `parameter_shapes`.
      window: Sizes of the window.
      inputs: `C`, of all groups.
      outputs: `M`, of all groups.
      strides: One for each axis of the window.

    Returns:
      A kernel `(*window rounded up to the strides, C / feature_groups, M)` for `isometric_conv` or
      `jax.lax.conv_general_dilated`, in the dtype of the parameters. Its cost does not depend on
      the images: two products of the kernel with a `large × large/2` matrix for each factor.

    Raises:
      ConfigError: Arrays that are not floating, or of shapes that `parameter_shapes` does not give;
        as there.

    Example:
      >>> draw = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape)
      >>> shapes = parameter_shapes((3, 3), 4, 6, (1, 1))
      >>> kernel = isometric_kernel(*map(draw, (0, 1), shapes), (3, 3), 4, 6, (1, 1))
      >>> x = draw(2, (2, 5, 5, 4))
      >>> y = isometric_conv(x, kernel)
      >>> bool(jnp.allclose(jnp.linalg.norm(x), jnp.linalg.norm(y), rtol=1e-5))
      True
    """
    projectors = checks.array("projectors", projectors, 4, exactly=True)
    mixing = checks.array("mixing", mixing, 3, exactly=True)
    shapes = parameter_shapes(window, inputs, outputs, strides, len(projectors))
    if mixing.dtype != projectors.dtype:
        raise checks.refuse("mixing", mixing, f"of dtype {projectors.dtype}, as `projectors`")
    if (projectors.shape, mixing.shape) != shapes:
        raise ConfigError(
            f"projectors {projectors.shape} and mixing {mixing.shape}: a window {tuple(window)} of"
            f" {inputs} inputs and {outputs} outputs with strides {tuple(strides)} needs {shapes}"
        )
    groups, count = len(projectors), math.prod(strides)
    places = _reduced(window, strides)
    ranges = cayley(projectors)
    kernel = jnp.swapaxes(cayley(mixing), -1, -2)  # (groups, small, large), orthonormal rows
    kernel = kernel.reshape((groups, *(1,) * len(places), *kernel.shape[1:]))
    for number, axis in enumerate(_turns(places)):
        kernel = _lengthened(kernel, ranges[:, number], 1 + axis)
    if inputs // groups * count > outputs // groups:
        kernel = jnp.swapaxes(kernel, -1, -2)
    # The channels of a patch go back to its places: (groups, *places, *strides, C, M).
    kernel = kernel.reshape((groups, *places, *strides, inputs // groups, outputs // groups))
    axes = range(1, 1 + len(places))
    pairs = itertools.chain.from_iterable((axis, axis + len(places)) for axis in axes)
    kernel = kernel.transpose((*pairs, kernel.ndim - 2, 0, kernel.ndim - 1))
    sizes = (place * stride for place, stride in zip(places, strides, strict=True))
    return kernel.reshape((*sizes, inputs // groups, outputs))


def isometric_conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int] | None = None,
    padding: str = "CIRCULAR",
    feature_groups: int = 1,
    precision: jax.lax.PrecisionLike = _HIGHEST,
) -> jax.Array:
    """The convolution of channels-last images, padded so that the norm is what the kernel promises.

    Args:
      x: `(N, *sides, C)`.
      kernel: Of `isometric_kernel`.
      strides: The kernel's; 1 by default.
      padding: `"CIRCULAR"`: exact, all singular values of the operator are 1. `"SAME"`, with zeros:
        the convolution of a larger periodic image of which a part is zero and a part is cut off;
        norms do not grow (the operator is 1-Lipschitz) but shrink at the border.
      feature_groups: The kernel's.
      precision: Of the products. On accelerators less than `HIGHEST` costs the fifth digit.

    Returns:
      `(N, *sides / strides, M)`; with zeros sides are rounded up.

    Raises:
      ConfigError: An unknown padding; sides that a stride does not divide, with circular padding;
        arrays that are not floating, or whose shapes do not fit together.

    Example: see `isometric_kernel`.
    """
    x, kernel = checks.array("x", x, 3), checks.array("kernel", kernel, 3)
    sides, window = x.shape[1:-1], kernel.shape[:-2]
    if kernel.ndim != x.ndim:
        raise checks.refuse("kernel", kernel, f"of the rank of x, which has the shape {x.shape}")
    if strides is None:
        strides = (1,) * len(sides)
    if len(sides) not in AXES:
        raise checks.refuse("x", x, "images of one to three sides, (N, *sides, C)")
    strides = checks.integers("strides", strides, 1, PER_AXIS, high=LARGEST_WINDOW, lengths=AXES)
    if len(strides) != len(sides):
        raise checks.refuse("strides", strides, f"one for each of the sides {sides} of x")
    checks.choice("padding", padding, PADDINGS)
    checks.integer("feature_groups", feature_groups, 1)
    if kernel.shape[-2] * feature_groups != x.shape[-1] or kernel.shape[-1] % feature_groups:
        raise ConfigError(
            f"kernel of shape {kernel.shape} and feature_groups={feature_groups} do not fit x of"
            f" shape {x.shape}: (*window, channels / groups, outputs) is needed"
        )
    if kernel.dtype != x.dtype:
        raise checks.refuse("kernel", kernel, f"of dtype {x.dtype}, as `x`")
    if padding == "CIRCULAR" and any(n % s for n, s in zip(sides, strides, strict=True)):
        raise ConfigError(
            f"an image of sides {sides} is no whole number of patches of {strides}: with circular"
            " padding the strides must divide the sides; or choose padding='SAME'"
        )
    totals = [
        max(0, (-(-n // s) - 1) * s + k - n) for n, s, k in zip(sides, strides, window, strict=True)
    ]
    widths = [(0, 0), *((total // 2, total - total // 2) for total in totals), (0, 0)]
    x = jnp.pad(x, widths, mode="wrap" if padding == "CIRCULAR" else "constant")
    spatial = "DHW"[-len(sides) :]
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        "VALID",
        dimension_numbers=numbers,
        feature_group_count=feature_groups,
        precision=precision,
    )


def max_min(x: jax.Array) -> jax.Array:
    """GroupSort of pairs: the larger of channels `c` and `c + C/2` first, the smaller behind it.

    A permutation of the channels at every place, so it keeps norms, of signals and cotangents; with
    orthogonal layers it approximates every 1-Lipschitz function, which ReLU does not.

    Args:
      x: `(..., C)`.

    Raises:
      ConfigError: `C` is odd, or `x` is no floating array.

    Source: Anil, Lucas and Grosse 2019, arXiv:1811.05381.

    Example:
      >>> max_min(jnp.array([1.0, 5.0, 3.0, 2.0])).tolist()
      [3.0, 5.0, 1.0, 2.0]
    """
    x = checks.array("x", x, 1)
    if x.shape[-1] % 2:
        raise ConfigError(
            f"max_min sorts pairs: x of shape {x.shape} has an odd number of channels"
        )
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([jnp.maximum(first, second), jnp.minimum(first, second)], axis=-1)


def _lengthened(kernel, basis, axis):
    """The kernel followed by `P, I − P` along an axis; `P` projects to the columns of the basis."""
    part = jnp.einsum("g...ml,glr->g...mr", kernel, basis, precision=_HIGHEST)
    part = jnp.einsum("g...mr,glr->g...ml", part, basis, precision=_HIGHEST)
    before = [(0, int(number == axis)) for number in range(kernel.ndim)]
    behind = [(int(number == axis), 0) for number in range(kernel.ndim)]
    return jnp.pad(part, before) + jnp.pad(kernel - part, behind)


def _reduced(window, strides):
    """The window in patches of the strides."""
    return [-(-size // stride) for size, stride in zip(window, strides, strict=True)]


def _turns(places):
    """The axes of the factors, in turn as long as their windows last."""
    longest = range(max(places) - 1)
    return [axis for turn in longest for axis, size in enumerate(places) if turn < size - 1]


def _matmul(left, right):
    return jnp.matmul(left, right, precision=_HIGHEST)
