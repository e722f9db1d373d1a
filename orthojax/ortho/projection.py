"""The nearest orthonormal kernels."""

from typing import Any

import jax
import jax.numpy as jnp

from orthojax.errors import ConfigError
from orthojax.matrices import gram, times
from orthojax.ortho.kernels import map_blocks, penalised
from orthojax.ortho.resolution import path_name
from orthojax.ortho.views import View


def project_orthonormal(
    params: Any,
    *,
    mask: Any = None,
    view: View | Any = None,
    grouping: str = "ceil",
    method: str = "newton_schulz",
    batched: bool = True,
) -> Any:
    """Replace every kernel by the nearest one, in Frobenius norm, with orthonormal columns.

    That is the orthogonal factor `U Vᵀ` of the polar decomposition of each block `W = U Σ Vᵀ`. With
    `grouping="none"`, a block with more columns than rows gets orthonormal rows.

    Args:
      params: Parameter tree.
      mask, view, grouping, batched: See `optax_ortho`.
      method: `"newton_schulz"` iterates `X ← X (3I − XᵀX)/2`, matrix products alone and cheap on
        accelerators and meshes, until `‖XᵀX − I‖` stops at rounding error. `"svd"` needs no
        iteration count and is exact for ill-conditioned kernels; slower on accelerators. A kernel
        without full rank has no unique nearest one: SVD picks one, Newton-Schulz leaves singular
        values of zero at zero.

    Returns:
      A tree like `params`; dtypes are kept, the work is done in float32 or better. Other leaves are
      returned as they are.

    Raises:
      ConfigError: An unknown method; otherwise as `optax_ortho`.

    Source: Higham 1986, "Computing the polar decomposition"; Björck and Bowie 1971.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 8))}
      >>> after = project_orthonormal(params)["kernel"].reshape(36, 8)
      >>> bool(jnp.allclose(after.T @ after, jnp.eye(8), atol=1e-5))
      True
    """
    if method not in ("newton_schulz", "svd"):
        raise ConfigError(f"method={method!r} is unknown: choose 'newton_schulz' or 'svd'")
    polar = _newton_schulz if method == "newton_schulz" else _svd
    kernels = penalised(params, mask, view, grouping)
    parts = map_blocks(lambda blocks, identity, layout: polar(blocks), kernels, batched)
    projected = {
        kernel.path: part.astype(array.dtype)
        for part, (array, kernel) in zip(parts, kernels, strict=True)
    }
    flat, treedef = jax.tree_util.tree_flatten_with_path(params, is_leaf=lambda x: x is None)
    return treedef.unflatten(projected.get(path_name(path), leaf) for path, leaf in flat)


def _newton_schulz(blocks, most_steps: int = 60):
    """Polar factors of blocks `(blocks, *inputs, n)`; columns of zeros stay zero."""
    shape = blocks.shape
    wide = blocks.shape[-1] > blocks[0, ..., 0].size
    if wide:
        blocks = blocks.reshape((shape[0], -1, shape[-1])).transpose(0, 2, 1)
    product = gram(blocks)
    # The largest row sum of WᵀW bounds its largest eigenvalue: afterwards no singular value is
    # above 1, and all of them grow to 1 without overshooting.
    bound = jnp.max(jnp.sum(jnp.abs(product), axis=2), axis=1)
    scale = jax.lax.rsqrt(jnp.where(bound > 0, bound, 1))
    blocks = blocks * scale.reshape((-1, *(1,) * (blocks.ndim - 1)))

    def step(carry):
        count, blocks, _ = carry
        product = gram(blocks)
        next_blocks = 1.5 * blocks - 0.5 * times(blocks, product)
        return count + 1, next_blocks, jnp.max(jnp.abs(next_blocks - blocks))

    def moving(carry):
        count, _, change = carry
        return (count < most_steps) & (change > 4 * jnp.finfo(blocks.dtype).eps)

    start = (jnp.zeros([], jnp.int32), blocks, jnp.asarray(jnp.inf, blocks.dtype))
    _, blocks, _ = jax.lax.while_loop(moving, step, start)
    return blocks.transpose(0, 2, 1).reshape(shape) if wide else blocks


def _svd(blocks):
    flat = blocks.reshape((blocks.shape[0], -1, blocks.shape[-1]))
    left, _, right = jnp.linalg.svd(flat, full_matrices=False)
    return times(left, right).reshape(blocks.shape)
