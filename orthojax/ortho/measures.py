"""The penalty as a number, and how far each kernel is from orthonormal."""

from typing import Any

import jax
import jax.numpy as jnp

from orthojax.matrices import gram
from orthojax.ortho.kernels import map_blocks, penalised, variant_named
from orthojax.ortho.variants import Variant
from orthojax.ortho.views import View


def ortho_penalty(
    params: Any,
    coefficient: jax.typing.ArrayLike = 1e-4,
    *,
    mask: Any = None,
    view: View | Any = None,
    grouping: str = "ceil",
    variant: str | Variant = "frobenius",
    batched: bool = True,
) -> jax.Array:
    """`λ/2 Σ P` over all kernels: the number whose gradient `optax_ortho` adds.

    For logging, for methods that want it in the loss (line search, second order), and as the
    reference that the closed forms are tested against: `jax.grad` of it is right for every variant.

    Args:
      params: Parameter tree.
      coefficient: λ.
      mask, view, grouping, variant, batched: See `optax_ortho`.

    Returns:
      A scalar, float32 (float64 if a kernel is). Zero for a tree without kernels.

    Raises:
      ConfigError: As `optax_ortho`.

    Example:
      >>> import jax.numpy as jnp
      >>> float(ortho_penalty({"kernel": 2 * jnp.eye(3)}, 2.0))  # 3 · (2² − 1)²
      27.0
    """
    variant = variant_named(variant)
    kernels = penalised(params, mask, view, grouping, variant.grouped)
    parts = map_blocks(variant.penalty, kernels, batched)
    return coefficient / 2 * sum((jnp.sum(part) for part in parts), jnp.zeros([], jnp.float32))


def orthonormality_error(
    params: Any,
    *,
    mask: Any = None,
    view: View | Any = None,
    grouping: str = "ceil",
    batched: bool = True,
) -> dict[str, jax.Array]:
    """`max_g ‖W_gᵀW_g − I‖_F / √n_g` of every kernel, by path: 0 is orthonormal, 1 a zero kernel.

    The maximum is over all blocks: stacked layers, feature groups and column groups, `n_g` being
    the number of columns of each. Can be called under `jax.jit`.

    Args:
      params: Parameter tree.
      mask, view, grouping, batched: See `optax_ortho`.

    Returns:
      A dictionary from path to a scalar in float32 (float64 for float64 kernels).

    Raises:
      ConfigError: As `optax_ortho`.

    Example:
      >>> import jax.numpy as jnp
      >>> orthonormality_error({"dense": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}})
      {'dense/kernel': Array(0., dtype=float32)}
    """
    kernels = penalised(params, mask, view, grouping)

    def relative_error(blocks, identity, layout):
        del layout
        squares = jnp.sum((gram(blocks) - identity) ** 2, axis=(1, 2))
        return jnp.sqrt(squares / jnp.sum(identity, axis=(1, 2)))

    parts = map_blocks(relative_error, kernels, batched)
    return {kernel.path: jnp.max(part) for part, (_, kernel) in zip(parts, kernels, strict=True)}
