"""The nearest orthonormal kernels."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from orthojax import checks
from orthojax.matrices import gram, times
from orthojax.ortho.kernels import map_blocks, penalized_or_refuse
from orthojax.ortho.views import View
from orthojax.tree_paths import path_name


def project_orthonormal(
    params: Any,
    mask: Any = None,
    *,
    view: View | Any = None,
    grouping: str = "ceil",
    method: str = "newton_schulz",
) -> Any:
    """Replace every kernel by the nearest one, in Frobenius norm, with orthonormal columns.

    That is the orthogonal factor `U Vᵀ` of the polar decomposition of each block `W = U Σ Vᵀ`. With
    `grouping="none"`, a block with more columns than rows gets orthonormal rows.

    Args:
      params: Parameter tree.
      mask, view, grouping: See `optax_ortho`.
      method: `"newton_schulz"` iterates `X ← X (3I − XᵀX)/2`, matrix products alone and cheap on
        accelerators and meshes, until `XᵀX` is the identity, whatever the condition of the kernel;
        `"svd"` computes the factors, slower on accelerators. A kernel without full rank has no
        unique nearest one: each picks one of them.

    Returns:
      A tree like `params`; dtypes are kept, the work is done in float32 or better. Other leaves are
      returned as they are.

    Raises:
      ConfigError: An unknown method; no kernel to project; otherwise as `optax_ortho`.

    Source: Higham 1986, "Computing the polar decomposition"; Björck and Bowie 1971.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 8))}
      >>> after = project_orthonormal(params)["kernel"].reshape(36, 8)
      >>> bool(jnp.allclose(after.T @ after, jnp.eye(8), atol=1e-5))
      True
    """
    checks.choice("method", method, ("newton_schulz", "svd"))
    factor = polar if method == "newton_schulz" else _svd
    kernels = penalized_or_refuse(params, mask, view, grouping)
    parts = map_blocks(factor, kernels)
    projected = {
        kernel.path: part.astype(array.dtype)
        for part, (array, kernel) in zip(parts, kernels, strict=True)
    }
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is None)
    return jax.tree.unflatten(
        treedef, [projected.get(path_name(path), leaf) for path, leaf in flat]
    )


def polar(blocks: jax.Array, identity: jax.Array) -> jax.Array:
    """Polar factors of blocks `(blocks, *inputs, n)`; columns of padding stay zero.

    By Newton and Schulz, of blocks of any scale and condition. A wide block gets orthonormal rows.
    """
    blocks = _with_full_rank(_scaled(blocks), identity)
    return of_tall(_polar_of_tall, blocks, identity)


def of_tall(function, blocks, identity, *others):
    """`function(blocks, identity, *others)`; of blocks with more columns than rows, the transposes.

    What `function` returns has the shape of the blocks that it is given, and is transposed back.
    """
    shape = blocks.shape
    if shape[-1] <= math.prod(shape[1:-1]):
        return function(blocks, identity, *others)
    turned = (x.reshape((shape[0], -1, shape[-1])).transpose(0, 2, 1) for x in (blocks, *others))
    blocks, *others = turned
    identity = jnp.eye(blocks.shape[-1], dtype=blocks.dtype)[None]
    return function(blocks, identity, *others).transpose(0, 2, 1).reshape(shape)


def _polar_of_tall(blocks, identity):
    # The largest row sum of WᵀW bounds its largest eigenvalue: afterwards no singular value is
    # above 1, and all of them grow to 1 without overshooting.
    product = gram(blocks)
    scale = jax.lax.rsqrt(row_sum(product))
    return newton_schulz(
        blocks * over_blocks(scale, blocks), product * over_blocks(scale**2, product), identity
    )


def newton_schulz(blocks, product, identity):
    """Iterates to the polar factor of tall blocks with `WᵀW = product`; singular values < √3.

    The iteration takes a singular value below 1/2 up by a factor of almost 3/2 a step, so it goes
    on until all have arrived: a bound on the change of `X` would stop it where some are too small
    to be seen.
    """
    # An excess E becomes at most 3/4 E² + 1/4 E³: from the root of the rounding error one step
    # leads to it, and its Gram matrix need not be seen any more.
    close = float(jnp.finfo(blocks.dtype).eps) ** 0.5

    def far(carry):
        count, _, product = carry
        excess = jnp.sum((product - identity) ** 2, axis=(1, 2))
        return (count < _MOST_STEPS) & jnp.any(excess > close**2)

    def step(carry):
        count, blocks, product = carry
        blocks = newton_schulz_step(blocks, product)
        return count + 1, blocks, gram(blocks)

    _, blocks, product = jax.lax.while_loop(far, step, (jnp.zeros([], jnp.int32), blocks, product))
    return newton_schulz_step(blocks, product)


def newton_schulz_step(blocks, product):
    """`X (3I − XᵀX)/2`, `product` being `XᵀX`."""
    return 1.5 * blocks - 0.5 * times(blocks, product)


def row_sum(product):
    """`(blocks,)`: the largest row sum of `|WᵀW|`, which bounds its largest eigenvalue."""
    return jnp.max(jnp.sum(jnp.abs(product), axis=2), axis=1)


# A singular value at the rounding error of float64 takes some 100 steps.
_MOST_STEPS = 200


def _svd(blocks, identity):
    shape = blocks.shape
    blocks = _scaled(blocks)
    flat = blocks.reshape((shape[0], -1, shape[-1]))
    padding = 1 - jnp.diagonal(identity, axis1=1, axis2=2)[:, None, :]
    if shape[-1] <= flat.shape[1]:
        # Columns of padding are filled with what is orthogonal to the others: the factors of a
        # block without full rank would mix them with zeros.
        flat = flat + padding * jnp.linalg.qr(flat)[0]
    left, _, right = jnp.linalg.svd(flat, full_matrices=False)
    factor = times(left, right) * (1 - padding)
    return factor.reshape(shape)


def _scaled(blocks):
    """Blocks whose largest entry is 1, so that no square over- or underflows; zero stays zero."""
    largest = jnp.max(jnp.abs(blocks), axis=tuple(range(1, blocks.ndim)), keepdims=True)
    return blocks / jnp.where(largest > jnp.finfo(blocks.dtype).tiny, largest, 1)


def _with_full_rank(blocks, identity):
    """The blocks, their largest entry 1, plus noise of a few units in its last place.

    Without it a singular value of zero stays zero. The noise moves the polar factor by as much as
    rounding the kernel does. (It is not from `jax.random`: what has a constant key XLA computes
    while compiling, which takes it half a minute.)
    """
    shape = (1, *blocks.shape[1:])
    places = (
        math.prod(shape[axis + 1 :]) * jax.lax.broadcasted_iota(blocks.dtype, shape, axis)
        for axis in range(1, len(shape))
    )
    noise = jnp.cos(0.7 * sum(places) ** 2)
    columns = jnp.diagonal(identity, axis1=1, axis2=2)
    columns = columns.reshape((len(columns), *(1,) * (blocks.ndim - 2), -1))
    return blocks + 8 * jnp.finfo(blocks.dtype).eps * noise * columns


def over_blocks(per_block, blocks):
    """`(blocks,)` shaped to multiply an array that has them in front."""
    return per_block.reshape((-1, *(1,) * (blocks.ndim - 1)))
