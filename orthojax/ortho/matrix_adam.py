"""Adam with one second moment for each matrix."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from orthojax import checks
from orthojax.matrices import from_blocks
from orthojax.ortho.kernels import (
    check_selection,
    map_blocks,
    penalized,
    penalized_or_refuse,
)
from orthojax.ortho.views import View
from orthojax.tree_paths import leaves_with_paths, path_name


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
      ConfigError: An impossible number; otherwise as `optax_ortho`.

    Source: Ling et al. 2022, arXiv:2205.13599 (VectorAdam).

    Example:
      >>> params = {"kernel": jnp.eye(2)}
      >>> adam = scale_by_matrix_adam()
      >>> updates, _ = adam.update({"kernel": 3 * jnp.eye(2)}, adam.init(params), params)
      >>> updates["kernel"].round(4).tolist()
      [[1.0, 0.0], [0.0, 1.0]]
    """

    checks.number("b1", b1, "[0, 1)", traced=True)
    checks.number("b2", b2, "[0, 1)", traced=True)
    checks.number("eps", eps, "[0, inf)", traced=True)
    check_selection(mask, view, grouping)

    def init_fn(params):
        kernels = penalized_or_refuse(params, mask, view, grouping)
        counts = {kernel.path: (kernel.blocks,) for _, kernel in kernels}
        nu = {
            path: jnp.zeros(counts.get(path, leaf.shape), _wide(leaf.dtype))
            for path, leaf in leaves_with_paths(params)
            if hasattr(leaf, "shape")
        }
        # optax.tree_map_params asks with a placeholder, a tree without leaves: one leaf stands for
        # all, since these are not of the parameters' shapes.
        moments = nu if jax.tree.leaves(params) else jnp.zeros([], jnp.float32)
        return MatrixAdamState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params), moments)

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(
            lambda g, m: None if g is None else _average(b1, m, g),
            updates,
            state.mu,
            is_leaf=lambda x: x is None,
        )
        known = state.nu if isinstance(state.nu, dict) else {}
        leaves = {path: leaf for path, leaf in leaves_with_paths(updates) if path in known}
        kernels = [
            (leaves[kernel.path], kernel)
            for _, kernel in penalized(params, mask, view, grouping)
            if kernel.path in leaves
        ]
        norms = map_blocks(_mean_square_of_columns, kernels)
        squares = {path: jnp.square(leaf) for path, leaf in leaves.items()}
        squares |= {kernel.path: norm for norm, (_, kernel) in zip(norms, kernels, strict=True)}
        nu = {path: _average(b2, moment, squares[path]) for path, moment in known.items()}
        first, second = (1 - jnp.power(b, count.astype(jnp.float32)) for b in (b1, b2))
        scales = {path: _scale(x, first, second, eps) for path, x in nu.items()}
        scales |= {kernel.path: _spread(scales[kernel.path], kernel) for _, kernel in kernels}
        flat, treedef = jax.tree_util.tree_flatten_with_path(mu)
        scaled = [_times(leaf, scales[path_name(path)]) for path, leaf in flat]
        return treedef.unflatten(scaled), MatrixAdamState(count, mu, nu if known else state.nu)

    return optax.GradientTransformation(init_fn, update_fn)


def _wide(dtype):
    return jnp.float64 if dtype == jnp.float64 else jnp.float32


def _mean_square_of_columns(blocks, identity):
    squares = jnp.sum(jnp.square(blocks), axis=tuple(range(1, blocks.ndim)))
    return squares / jnp.sum(identity, axis=(1, 2))


def _scale(moment, first, second, eps):
    """What a first moment is multiplied with; `first` and `second` undo the bias to zero."""
    first, second, eps = (jnp.asarray(x, moment.dtype) for x in (first, second, eps))
    return 1 / (first * (jnp.sqrt(moment / second) + eps))


def _times(leaf, scale):
    return (leaf.astype(scale.dtype) * scale).astype(leaf.dtype)


def _average(decay, before, value):
    """The running average, in its own dtype: nothing is left to promotion."""
    keep, take = (jnp.asarray(x, before.dtype) for x in (decay, 1 - decay))
    return keep * before + take * value.astype(before.dtype)


def _spread(per_block, kernel):
    """A number for each block, as an array of the kernel's shape."""
    inputs = [kernel.shape[axis] for axis in kernel.axes.inputs]
    blocks = jax.lax.broadcast_in_dim(per_block, (kernel.blocks, *inputs, max(kernel.groups)), (0,))
    return from_blocks(blocks, kernel.shape, kernel.axes, kernel.grouping)
