"""Initializers that make kernels orthonormal, with the signature of `jax.nn.initializers`.

An initializer is a function `(key, shape, dtype=float32) -> array`; the last axis of `shape` is
the output, all others the input (the layout of JAX and Flax).
"""

import math
import warnings

import jax
import jax.numpy as jnp

from orthojax import checks
from orthojax.errors import ConfigError
from orthojax.matrices import GROUPINGS, accumulation_dtype, group_sizes, orthonormal_factor


def orthonormal(groups: str = "ceil", gain: float = 1.0, feature_groups: int = 1):
    """An initializer whose kernels have orthonormal columns, `WᵀW = gain² I`, Haar distributed.

    The kernel is read as `W` of shape `(f_in, f_out)`, all axes but the last against the last.
    Gram-Schmidt on Gaussian columns, output channel by output channel, is the QR decomposition of
    a Gaussian matrix with the signs of R's diagonal made positive; the latter is what is computed,
    because it is stable (section 4 of the paper; Mezzadri 2007, arXiv:math-ph/0609050).

    What is orthonormal: all columns if `f_out <= f_in`. Otherwise the columns of each group of
    `orthojax.matrices.group_sizes(f_in, f_out, groups)`, groups being independent of each other.
    A repeated random 3×3 kernel is not an isometry of the *convolution*; see `delta_orthonormal`.

    Args:
      groups: `"ceil"` or `"literal"`, the grouping to give to `optax_ortho` as well.
      gain: Singular value of every group. `optax_ortho` pulls toward 1.
      feature_groups: `feature_group_count` of a grouped convolution, the number of inputs of a
        depthwise one: the outputs of each feature group are made orthonormal by themselves.

    Returns:
      `init(key, shape, dtype=float32)`; `shape` of rank >= 2, `dtype` any floating dtype. The
      decomposition is computed in float32 (float64 for float64), then cast: a bfloat16 kernel is
      the rounding of an orthonormal one.

    Raises:
      ConfigError: Unknown `groups`, an impossible number; at call time, a shape of rank < 2, a
        non-floating dtype, or outputs that `feature_groups` does not divide.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> kernel = orthonormal()(jax.random.key(0), (3, 3, 16, 32))
      >>> matrix = kernel.reshape(-1, 32)
      >>> bool(jnp.allclose(matrix.T @ matrix, jnp.eye(32), atol=1e-5))
      True
    """
    if groups == "none":
        raise ConfigError(
            "groups='none': more columns than rows cannot be orthonormal in one group"
        )
    checks.choice("groups", groups, GROUPINGS[:2])
    checks.number("gain", gain, "[0, inf)", traced=True)
    checks.integer("feature_groups", feature_groups, 1)

    def init(key, shape, dtype=jnp.float32):
        shape, dtype = _of_kernel(shape, dtype, gain)
        rows, columns = math.prod(shape[:-1]), _columns_of_a_group(shape, feature_groups)
        if not rows or not columns:
            return jnp.zeros(shape, dtype)
        matrix = _of_every_group(
            key,
            feature_groups,
            lambda k: _grouped_columns(k, rows, columns, groups, accumulation_dtype(dtype)),
        )
        return _scaled(matrix.reshape(shape), gain).astype(dtype)

    return init


def delta_orthonormal(gain: float = 1.0, feature_groups: int | None = None):
    """An initializer whose kernels are zero but for the center tap, a semi-orthonormal matrix.

    A kernel of shape `(*window, C, M)` becomes `K[center] = gain · A` with `A` of shape `(C, M)`
    and `center = (size − 1) // 2` along each window axis, so that a convolution of stride 1 is
    `y(x) = gain · Aᵀ u(x + shift)` at every place: with circular padding its transfer matrix is
    `A` times a phase at every frequency, and all its `min(C, M)` singular values are `gain`.

    What is orthonormal, exactly (at gain 1):

    - `C == M`: `AᵀA = AAᵀ = I`. The convolution is an orthogonal operator.
    - `C > M`: `AᵀA = I`. The columns of the kernel are orthonormal, cotangents keep their norm on
      the way down, and `optax_ortho` finds nothing to correct.
    - `C < M` (expanding): `AAᵀ = I`. Every input keeps its norm, `‖y‖ = ‖u‖`. The `M` columns are
      *not* orthonormal (`WᵀW` is a projection of rank `C`), so the penalty of `optax_ortho` starts
      at `M − C` there; `orthonormal()` starts it at zero and gives up the isometry.
    - Stride `s > 1`: the layer reads one input place in `s` per axis and drops the others; the
      statements above hold for the places that are read: `C <= M` keeps their norm, and with
      `C >= M` the operator's rows are orthonormal, so that cotangents keep theirs.

    Source: Xiao et al. 2018, arXiv:1806.05393, algorithm 1, extended to `C > M`.

    Args:
      gain: Singular value of the convolution.
      feature_groups: `feature_group_count` of the convolution, by default 1; each group gets a
        matrix `A` of its own, and the statements above hold for it. An expanding kernel and that of
        a grouped convolution have one shape and different matrices, and nothing tells them apart:
        **give it to every grouped convolution**. A window of one input is most often that of a
        depthwise one: a warning says so where this is not given.

    Returns:
      `init(key, shape, dtype=float32)`; `shape` of rank >= 2 (rank 2 is a dense layer: no window),
      `dtype` any floating dtype, computed in float32 or better, then cast.

    Raises:
      ConfigError: An impossible number; at call time, a shape of rank < 2, a non-floating dtype, or
        outputs that `feature_groups` does not divide.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> kernel = delta_orthonormal()(jax.random.key(0), (3, 3, 8, 4), jnp.bfloat16)
      >>> center = kernel[1, 1].astype(jnp.float32)
      >>> bool(jnp.allclose(center.T @ center, jnp.eye(4), atol=2e-2)), kernel.dtype.name
      (True, 'bfloat16')
    """

    checks.number("gain", gain, "[0, inf)", traced=True)
    if feature_groups is not None:
        checks.integer("feature_groups", feature_groups, 1)

    def init(key, shape, dtype=jnp.float32):
        shape, dtype = _of_kernel(shape, dtype, gain)
        *window, inputs, outputs = shape
        if feature_groups is None and window and inputs == 1 < outputs:
            warnings.warn(
                f"delta_orthonormal: a kernel of shape {shape} is taken for that of a convolution"
                " of one channel; it is no isometry of a depthwise one. Say which by"
                " delta_orthonormal(feature_groups=1), or the layer's feature_group_count there",
                stacklevel=2,
            )
        groups = feature_groups or 1
        columns = _columns_of_a_group(shape, groups)
        if 0 in shape:
            return jnp.zeros(shape, dtype)
        tap = _of_every_group(
            key, groups, lambda k: _semi_orthonormal(k, inputs, columns, accumulation_dtype(dtype))
        )
        center = tuple((size - 1) // 2 for size in window)
        kernel = jnp.zeros(shape, tap.dtype).at[center].set(_scaled(tap, gain))
        return kernel.astype(dtype)

    return init


def carrying(share: float = 0.5):
    """Orthonormal kernels in which a share of the outputs carries inputs on; the rest computes.

    Output `i` of the carrying, the first `round(share · M)`, is input `i`: the center tap is 1 and
    all else 0. The other outputs are orthonormal columns over all inputs but the center taps that
    are carried, so that `WᵀW = I`. Nothing leads from what is computed to what is carried: a stack
    of such layers begins as a shallow net and grows as these weights do, as a residual net does
    whose branches begin at 0.

    Args:
      share: From 0 to 1.

    Returns:
      `init(key, shape, dtype=float32)`; `shape` of rank >= 2 with as many outputs as inputs.

    Raises:
      ConfigError: `share` is out of its range; at call time, a shape of rank < 2, a non-floating
        dtype, or outputs that are not as many as the inputs.

    Example:
      >>> kernel = carrying(0.5)(jax.random.key(0), (3, 3, 4, 4))
      >>> kernel[1, 1, :, :2].tolist()
      [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]
      >>> matrix = kernel.reshape(36, 4)
      >>> bool(jnp.allclose(matrix.T @ matrix, jnp.eye(4), atol=1e-6))
      True
    """
    checks.number("share", share, "[0, 1]")

    def init(key, shape, dtype=jnp.float32):
        shape, dtype = _of_kernel(shape, dtype)
        *window, inputs, outputs = shape
        if inputs != outputs:
            raise ConfigError(
                f"a kernel of shape {shape} carries nothing: it has {inputs} inputs and"
                f" {outputs} outputs, which must be as many"
            )
        if 0 in shape:
            return jnp.zeros(shape, dtype)
        carried = jnp.arange(round(share * outputs))
        taps = (*((size - 1) // 2 for size in window), carried)
        wide = accumulation_dtype(dtype)
        free = jnp.ones(shape[:-1], wide).at[taps].set(0).reshape(-1, 1)
        normal = jax.random.normal(key, (free.size, outputs - carried.size), wide)
        columns = orthonormal_factor(normal * free).reshape((*shape[:-1], -1))
        identity = jnp.zeros((*shape[:-1], carried.size), wide).at[(*taps, carried)].set(1)
        return jnp.concatenate([identity, columns], axis=-1).astype(dtype)

    return init


def mirrored(init):
    """Kernels `[K, -K]` over the inputs, for layers above a CReLU: `K relu(x) - K relu(-x) = K x`.

    So a net of such layers is linear at initialization ("looks linear"; Balduzzi et al. 2017,
    arXiv:1702.08591).

    Args:
      init: of K, which has half the inputs.

    Returns:
      `init(key, shape, dtype=float32)`.

    Raises:
      ConfigError: `init` cannot be called; at call time, a shape of rank < 2 or an odd number of
        inputs.

    Example:
      >>> import jax
      >>> kernel = mirrored(orthonormal())(jax.random.key(0), (8, 3))
      >>> bool((kernel[:4] == -kernel[4:]).all())
      True
    """

    checks.function("init", init, "an initializer (key, shape, dtype) -> array")

    def mirror(key, shape, dtype=jnp.float32):
        shape, dtype = _of_kernel(shape, dtype)
        *window, inputs, outputs = shape
        if inputs % 2:
            raise ConfigError(f"a kernel of shape {shape} has no two halves of its {inputs} inputs")
        half = init(key, (*window, inputs // 2, outputs), dtype)
        return jnp.concatenate([half, -half], axis=-2)

    return mirror


def orthonormal_columns(key, rows: int, columns: int, dtype=jnp.float32) -> jax.Array:
    """A Haar-distributed `(rows, columns)` matrix with `QᵀQ = I`; `rows >= columns`.

    Computed in float32, or float64 if that is the dtype, and then cast.

    Raises:
      ConfigError: An impossible number, or a non-floating dtype.

    Example:
      >>> import jax
      >>> orthonormal_columns(jax.random.key(0), 5, 3).shape
      (5, 3)
    """
    checks.integer("columns", columns, 0)
    checks.integer("rows", rows, columns)
    checks.shape("rows, columns", (rows, columns))
    dtype = checks.dtype("dtype", dtype)
    wide = accumulation_dtype(dtype)
    # With other signs than those of Gram-Schmidt Q would not be uniformly distributed.
    return orthonormal_factor(jax.random.normal(key, (rows, columns), wide)).astype(dtype)


def _of_every_group(key, groups, make):
    """`make(key)` of every feature group, `(rows, columns)` each, side by side."""
    if groups == 1:
        return make(key)
    parts = jax.vmap(make)(jax.random.split(key, groups))
    return jnp.moveaxis(parts, 0, 1).reshape(parts.shape[1], -1)


def _semi_orthonormal(key, rows, columns, dtype):
    """`(rows, columns)` with orthonormal columns, or rows if these are fewer."""
    tall = orthonormal_columns(key, max(rows, columns), min(rows, columns), dtype)
    return tall if rows >= columns else tall.T


def _grouped_columns(key, fan_in, fan_out, groups, dtype):
    sizes = group_sizes(fan_in, fan_out, groups)
    keys = jax.random.split(key, len(sizes))
    whole = sum(size == sizes[0] for size in sizes)
    parts = [
        part
        for first, last in ((0, whole), (whole, len(sizes)))
        if first < last
        for part in jax.vmap(lambda k, n=sizes[first]: orthonormal_columns(k, fan_in, n, dtype))(
            keys[first:last]
        )
    ]
    return jnp.concatenate(parts, axis=1)


def _columns_of_a_group(shape, feature_groups):
    if shape[-1] % feature_groups:
        raise ConfigError(
            f"the {shape[-1]} outputs of a kernel of shape {shape} cannot be cut into"
            f" feature_groups={feature_groups} equal parts"
        )
    return shape[-1] // feature_groups


def _of_kernel(shape, dtype, gain=1.0):
    """Shape and dtype of a kernel, checked."""
    shape = checks.shape("shape", shape)
    dtype = checks.dtype("dtype", dtype)
    if len(shape) < 2:
        raise ConfigError(
            f"a kernel of shape {shape} has no matrix: rank 2 or more is needed"
            " (inputs, then the outputs); initialize biases and scales with something else"
        )
    checks.fits("gain", gain, dtype)
    return shape, dtype


def _scaled(matrix, gain):
    return jnp.asarray(gain, matrix.dtype) * matrix
