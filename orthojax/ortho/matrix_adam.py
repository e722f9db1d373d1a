"""Adam with one second moment for each matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from orthojax.matrices import from_blocks
from orthojax.ortho.kernels import map_blocks, penalized, penalized_or_refuse
from orthojax.ortho.paths import leaves_with_paths, path_name
from orthojax.ortho.views import View


class MatrixAdamState(NamedTuple):
    """State of `scale_by_matrix_adam`.

    Attributes:
      count: int32 scalar, updates so far.
      mu: first moments, like the parameters.
      nu: second moments by path: `(blocks,)` of kernels, the shape of the parameter of others;
        float32 or better.
    """

    count: jax.Array  # type: ignore[assignment]
    mu: Any
    nu: dict[str, jax.Array]


def scale_by_matrix_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    mask: Any = None,
    *,
    view: View | Any = None,
    grouping: str = "ceil",
) -> optax.GradientTransformation:
    r"""Rescale updates as Adam does, every kernel by one number: the direction stays that of μ.

    .. math::
      \mu \leftarrow \beta_1 \mu + (1 - \beta_1) G, \quad
      \nu \leftarrow \beta_2 \nu + (1 - \beta_2) \|G\|_F^2 / n, \quad
      U = \frac{\mu / (1 - \beta_1^t)}{\sqrt{\nu / (1 - \beta_2^t)} + \epsilon}

    with one :math:`\nu` for each block of `n` columns. Adam's own division, entry by entry, turns a
    tangent vector of the Stiefel manifold into something else and depends on the basis; this one
    does neither. The columns of `U` have norm one in quadratic mean, so with `stiefel` around it
    the learning rate is the angle, in radians, by which a column turns in a step. Parameters that
    are no kernels get Adam.

    Args:
      b1: Decay of the first moment.
      b2: Decay of the second moment.
      eps: Added to its root.
      mask, view, grouping: See `optax_ortho`; for `False` Adam is used.

    Returns:
      An `optax.GradientTransformation` with `MatrixAdamState`; updates keep their dtype.

    Raises:
      ValueError: `update` without `params` (optax's message).
      ConfigError: As `optax_ortho`.

    Source: Ling et al. 2022, arXiv:2205.13599 (VectorAdam).

    Example:
      >>> params = {"kernel": jnp.eye(2)}
      >>> adam = scale_by_matrix_adam()
      >>> updates, _ = adam.update({"kernel": 3 * jnp.eye(2)}, adam.init(params), params)
      >>> updates["kernel"].round(4).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    def init_fn(params):
        kernels = penalized_or_refuse(params, mask, view, grouping)
        counts = {kernel.path: (kernel.blocks,) for _, kernel in kernels}
        nu = {
            path: jnp.zeros(counts.get(path, leaf.shape), jnp.promote_types(leaf.dtype, "float32"))
            for path, leaf in leaves_with_paths(params)
            if hasattr(leaf, "shape")
        }
        return MatrixAdamState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params), nu)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        leaves = {path: leaf for path, leaf in leaves_with_paths(updates) if path in state.nu}
        kernels = [
            (leaves[kernel.path], kernel)
            for _, kernel in penalized(params, mask, view, grouping)
            if kernel.path in leaves
        ]
        norms = map_blocks(_mean_square_of_columns, kernels)
        squares = {path: jnp.square(leaf) for path, leaf in leaves.items()}
        squares |= {kernel.path: norm for norm, (_, kernel) in zip(norms, kernels, strict=True)}
        nu = {
            path: b2 * moment + (1 - b2) * squares[path].astype(moment.dtype)
            for path, moment in state.nu.items()
        }
        scales = {path: 1 / (jnp.sqrt(x / (1 - b2**count)) + eps) for path, x in nu.items()}
        scales |= {kernel.path: _spread(scales[kernel.path], kernel) for _, kernel in kernels}
        flat, treedef = jax.tree_util.tree_flatten_with_path(mu)
        first = 1 - b1**count
        scaled = [
            (leaf / first * scales[path_name(path)]).astype(leaf.dtype) for path, leaf in flat
        ]
        return treedef.unflatten(scaled), MatrixAdamState(count, mu, nu)

    return optax.GradientTransformation(init_fn, update_fn)


def _mean_square_of_columns(blocks, identity, layout):
    del layout
    squares = jnp.sum(jnp.square(blocks), axis=tuple(range(1, blocks.ndim)))
    return squares / jnp.sum(identity, axis=(1, 2))


def _spread(per_block, kernel):
    """A number for each block, as an array of the kernel's shape."""
    inputs = [kernel.shape[axis] for axis in kernel.axes.inputs]
    blocks = jax.lax.broadcast_in_dim(per_block, (kernel.blocks, *inputs, max(kernel.groups)), (0,))
    return from_blocks(blocks, kernel.shape, kernel.axes, kernel.grouping)
