"""The penalty as a number, how far each kernel is from orthonormal, and how alike its columns."""

from typing import Any

import jax
import jax.numpy as jnp

from orthojax import checks
from orthojax.errors import ConfigError
from orthojax.matrices import gram
from orthojax.ortho.kernels import (
    Kernel,
    map_blocks,
    penalized,
    penalized_or_refuse,
)
from orthojax.ortho.penalty import penalty
from orthojax.ortho.views import View


def ortho_penalty(
    params: Any,
    coefficient: jax.typing.ArrayLike = 1e-4,
    mask: Any = None,
    *,
    view: View | Any = None,
    grouping: str = "ceil",
) -> jax.Array:
    """`λ/2 Σ ‖WᵀW − I‖_F²` over all kernels: the number whose gradient `optax_ortho` adds.

    For logging, for methods that want it in the loss (line search, second order), and as the
    reference that the closed form is tested against by `jax.grad`.

    Args:
      params: Parameter tree.
      coefficient: λ.
      mask, view, grouping: See `optax_ortho`.

    Returns:
      A scalar, float32 (float64 if a kernel is).

    Raises:
      ConfigError: As `optax_ortho`.

    Example:
      >>> import jax.numpy as jnp
      >>> float(ortho_penalty({"kernel": 2 * jnp.eye(3)}, 2.0))  # 3 · (2² − 1)²
      27.0
    """
    checks.number("coefficient", coefficient, "[0, inf)", traced=True)
    kernels = penalized_or_refuse(params, mask, view, grouping)
    sums = [jnp.sum(part) for part in map_blocks(penalty, kernels)]
    total = _total(sums)
    return jnp.asarray(coefficient, total.dtype) / 2 * total


def orthonormality_error(
    params: Any,
    mask: Any = None,
    *,
    view: View | Any = None,
    grouping: str = "ceil",
) -> dict[str, jax.Array]:
    """`max_g ‖W_gᵀW_g − I‖_F / √n_g` of every kernel, by path: 0 is orthonormal, 1 a zero kernel.

    The maximum is over all blocks: stacked layers, feature groups and column groups, `n_g` being
    the number of columns of each. Can be called under `jax.jit`.

    Args:
      params: Parameter tree.
      mask, view, grouping: See `optax_ortho`.

    Returns:
      A dictionary from path to a scalar in float32 (float64 for float64 kernels); empty where
      nothing is a kernel.

    Raises:
      ConfigError: As `optax_ortho`.

    Example:
      >>> import jax.numpy as jnp
      >>> orthonormality_error({"dense": {"kernel": jnp.eye(3), "bias": jnp.ones(3)}})
      {'dense/kernel': Array(0., dtype=float32)}
    """
    return errors_of(penalized(params, mask, view, grouping))


def errors_of(kernels: list[tuple[jax.Array, Kernel]]) -> dict[str, jax.Array]:
    """`orthonormality_error` of kernels that were found already."""

    def relative_error(blocks, identity):
        squares = jnp.sum((gram(blocks) - identity) ** 2, axis=(1, 2))
        return jnp.sqrt(squares / jnp.sum(identity, axis=(1, 2)))

    parts = map_blocks(relative_error, kernels)
    return {kernel.path: jnp.max(part) for part, (_, kernel) in zip(parts, kernels, strict=True)}


def mean_correlation(
    params: Any,
    mask: Any = None,
    *,
    diagonal: bool = True,
    absolute: bool = False,
    view: Any = None,
) -> jax.Array:
    r"""Mean cosine of the angle between the columns of a kernel, over all pairs of all kernels.

    .. math::
      \bar s = \frac{1}{N} \sum_l \sum_i \sum_{j \ge i}
      \frac{v_i^{(l)} \cdot v_j^{(l)}}{\|v_i^{(l)}\| \|v_j^{(l)}\|}

    is Eq. 8 of Xie et al. (2017), `N` being the number of pairs. As printed `j` starts at `i`: each
    column counts with itself, as a 1, so that an orthonormal kernel of `n` columns has
    `2 / (n + 1)` and not 0. And signs cancel. Without the diagonal, and of absolute values, it
    measures what its name says.

    Args:
      params: Parameter tree.
      diagonal: Whether pairs `(i, i)` count.
      absolute: Whether absolute values are averaged.
      mask, view: See `optax_ortho`. All columns of a kernel are compared; there are no groups.

    Returns:
      A scalar in float32 (float64 if a kernel is). A column of zeros has the cosine 0 with all.

    Raises:
      ConfigError: As `optax_ortho`; no two columns to compare.

    Example:
      >>> import jax.numpy as jnp
      >>> kernel = jnp.eye(3)
      >>> float(mean_correlation({"kernel": kernel})), float(2 / (3 + 1))
      (0.5, 0.5)
      >>> float(mean_correlation({"kernel": kernel}, diagonal=False))
      0.0
    """
    checks.flag("diagonal", diagonal)
    checks.flag("absolute", absolute)
    kernels = penalized(params, mask, view, "none")

    def cosines(blocks, identity):
        del identity
        norms = jnp.linalg.norm(blocks.reshape(len(blocks), -1, blocks.shape[-1]), axis=1)
        unit = blocks / jnp.where(norms > 0, norms, 1).reshape(
            len(blocks), *(1,) * (blocks.ndim - 2), -1
        )
        products = gram(unit)
        products = jnp.abs(products) if absolute else products
        ones = jnp.trace(products, axis1=1, axis2=2)
        pairs = (jnp.sum(products, axis=(1, 2)) - ones) / 2
        return pairs + ones if diagonal else pairs

    sums = map_blocks(cosines, kernels)
    columns = [kernel.fan[1] for _, kernel in kernels]
    count = sum(
        kernel.blocks * n * (n + 1 if diagonal else n - 1) // 2
        for n, (_, kernel) in zip(columns, kernels, strict=True)
    )
    if not count:
        raise ConfigError("there are no two columns to compare in these `params`")
    return _total([jnp.sum(part) for part in sums]) / count


def _total(sums):
    """The sum of scalars in the widest of their dtypes; a float32 zero of none."""
    dtype = jnp.float64 if any(part.dtype == jnp.float64 for part in sums) else jnp.float32
    return sum((part.astype(dtype) for part in sums), jnp.zeros([], dtype))
