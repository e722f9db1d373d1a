"""Kernels that stay orthonormal: any optax optimizer, on the Stiefel manifold."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from orthojax import checks
from orthojax.matrices import cross_gram, gram, orthonormal_factor, times
from orthojax.ortho.kernels import (
    check_selection,
    map_blocks,
    penalized,
    penalized_or_refuse,
)
from orthojax.ortho.projection import (
    newton_schulz,
    newton_schulz_step,
    of_tall,
    over_blocks,
    polar,
    row_sum,
)
from orthojax.ortho.views import View
from orthojax.tree_paths import leaves_with_paths, path_name


class StiefelState(NamedTuple):
    """State of `stiefel`.

    Attributes:
      inner_state: of the wrapped transformation.
      count: int32 scalar, updates so far; the first one projects.
    """

    inner_state: Any
    count: jax.Array  # type: ignore[assignment]


def stiefel(
    inner: optax.GradientTransformation,
    method: str = "polar",
    mask: Any = None,
    *,
    view: View | Any = None,
    grouping: str = "ceil",
    attraction: Any = 0.5,
    project_gradient: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Wrap an optimizer so that every kernel keeps orthonormal columns, `WᵀW = I`.

    .. math::
      G \leftarrow P_W(G), \quad U = P_W(\mathrm{inner}(G)), \quad W \leftarrow R(W, U), \qquad
      P_W(Z) = Z - W\, \mathrm{sym}(W^\top Z)

    :math:`P_W` is the orthogonal projection to the tangent space of the Stiefel manifold, so the
    `inner` optimizer gets the Riemannian gradient of the Euclidean metric, and whatever momentum
    and rescaling make of it becomes tangent again. The method returns to the manifold:

    ========= ============================================= ==================== =================
    method    new kernel, `M = W + U`                       products of n × n    error of `WᵀW − I`
    ========= ============================================= ==================== =================
    `polar`   the nearest one, `M (MᵀM)^{-1/2}`, iterated   4 and 2 more for     rounding
              (Newton–Schulz) until it is that              each iteration
    `qr`      `Q` of `M = QR`, the diagonal of `R` > 0      2 and a QR           rounding
    `pogo`    `M + λ M (I − MᵀM)`, `λ = 1/2`                4                    `3/4 ‖U‖⁴`
    `landing` `M − a W (WᵀW − I)`, never on the manifold    3                    `‖U‖² / 2a`
    ========= ============================================= ==================== =================

    with two more products where the gradient is projected, `‖U‖` the spectral norm of a step (of
    SGD: learning rate × gradient). `polar` and `qr` take steps of any size. Of the
    others steps should stay below `‖U‖ = 1/2`; beyond 1 they lead away from the manifold. On short
    steps `polar` is `pogo`, with a look at the error.

    It is the whole of the optimizer, learning rate included, as `modulation` is:

        stiefel(optax.sgd(0.1, momentum=0.9))

    and what it returns is the difference to the new kernel: put nothing behind it that changes
    updates. `MultiSteps`, `apply_if_finite`, `multi_transform` and `modulation` go around it.

    Args:
      inner: Any optax transformation. It sees all parameters. Decay of kernels in it, of the
        weights or of their orthonormality, has no effect: it is normal to the manifold.
      method: How to return to the manifold, see above.
      mask: As in `optax_ortho`: `False` leaves a parameter to `inner`, untouched. So are biases and
        everything else that the view calls no kernel.
      view, grouping: See `optax_ortho`. A kernel with more columns than rows is constrained in
        column groups; with `grouping="none"` its rows become orthonormal.
      attraction: `a` of `landing`, in (0, 1), may be traced: an error `ε` of a singular value
        becomes `(1 − 2a) ε` in a step.
      project_gradient: Whether `inner` gets the Riemannian gradient. `False` gives it the gradient
        as it is, as POGO does, and saves two products. Without momentum in `inner` that changes
        nothing. With it, the parts of gradients that are normal to the manifold, and do not vanish
        at the optimum, add up in momentum and in Adam's second moment.

    Returns:
      An `optax.GradientTransformationExtraArgs` with `StiefelState`. `init` cannot change the
      parameters, so **the first update projects**: kernels that are not orthonormal become the
      nearest that are, and step from there (along the gradient that was taken where they were;
      `project_orthonormal(params)` before `init` avoids even this). Work is done in float32 or
      better. Updates keep their dtype. float32 parameters reach an `orthonormality_error` under
      1e-6; bfloat16 ones 2.5e-3, which is the rounding of an orthonormal kernel.

    Raises:
      ValueError: `update` without `params` (optax's message).
      ConfigError: `inner` is no transformation; an unknown method or grouping; an impossible
        `attraction`; an invalid mask or view; at `init`, as `optax_ortho`.

    Example:
      >>> from orthojax import orthonormality_error
      >>> target = jnp.array([[0.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
      >>> params = {"kernel": jnp.eye(3, 2) + 0.1, "bias": jnp.zeros(2)}
      >>> tx = stiefel(optax.sgd(0.2, momentum=0.5))
      >>> state = tx.init(params)
      >>> @jax.jit
      ... def step(params, state):
      ...     grads = jax.grad(lambda p: jnp.sum((p["kernel"] - target) ** 2))(params)
      ...     updates, state = tx.update(grads, state, params)
      ...     return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...     params, state = step(params, state)
      >>> bool(orthonormality_error(params)["kernel"] < 1e-5)
      True
      >>> abs(params["kernel"].round(3)).tolist()
      [[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]]

    References:
      Absil, Mahony and Sepulchre 2008, "Optimization algorithms on matrix manifolds" (projection,
      polar and QR retraction); Javaloy and Vergari 2026, arXiv:2602.14656 (POGO, there with the
      relative gradient); Ablin and Peyré 2022, arXiv:2102.07432 (landing).
    """
    checks.transformation("inner", inner)
    checks.choice("method", method, METHODS)
    check_selection(mask, view, grouping)
    checks.number("attraction", attraction, "(0, 1)", traced=True)
    checks.flag("project_gradient", project_gradient)
    inner = optax.with_extra_args_support(inner)
    retract = METHODS[method]

    def move(blocks, identity, step):
        return retract(blocks, identity, step, attraction)

    def init_fn(params):
        # As in `optax_ortho`, what cannot be read is an error now.
        penalized_or_refuse(params, mask, view, grouping)
        return StiefelState(inner.init(params), jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        present = {path for path, update in leaves_with_paths(updates) if update is not None}
        found = [(a, k) for a, k in penalized(params, mask, view, grouping) if k.path in present]
        descriptions = [kernel for _, kernel in found]
        arrays = jax.lax.cond(
            state.count == 0,
            lambda arrays: _projected(arrays, descriptions),
            lambda arrays: arrays,
            [array for array, _ in found],
        )
        kernels = list(zip(arrays, descriptions, strict=True))
        if project_gradient:
            updates = _replaced(updates, kernels, _of_pairs(_tangent, kernels, updates))
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        moved = _of_pairs(move, kernels, updates)
        changes = [new - old.astype(new.dtype) for new, (old, _) in zip(moved, found, strict=True)]
        updates = _replaced(updates, kernels, changes)
        return updates, StiefelState(inner_state, optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _projected(arrays, descriptions):
    """The nearest orthonormal kernels."""
    parts = map_blocks(polar, list(zip(arrays, descriptions, strict=True)))
    return [part.astype(array.dtype) for part, array in zip(parts, arrays, strict=True)]


def _of_pairs(function, kernels, updates):
    """`function(blocks, identity, blocks of the updates)` of every kernel."""
    leaves = dict(leaves_with_paths(updates))
    return map_blocks(
        lambda blocks, identity, others: of_tall(function, blocks, identity, others),
        kernels,
        [leaves[kernel.path] for _, kernel in kernels],
    )


def _replaced(updates, kernels, parts):
    """The updates with these in the places of the kernels'."""
    of = {kernel.path: part for part, (_, kernel) in zip(parts, kernels, strict=True)}
    flat, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda x: x is None)
    named = [(path_name(path), leaf) for path, leaf in flat]
    return treedef.unflatten(
        of[path].astype(leaf.dtype) if path in of else leaf for path, leaf in named
    )


def _tangent(blocks, identity, vectors):
    """`Z − W sym(WᵀZ)`, the projection to the tangent space at `W`."""
    del identity
    return vectors - times(blocks, _symmetric(cross_gram(blocks, vectors)))


def _symmetric(matrices):
    return (matrices + jnp.swapaxes(matrices, 1, 2)) / 2


def _within_reach(blocks, product):
    """Blocks and their `WᵀW`, scaled down where a singular value may be above √2.

    Beyond √3 a Newton–Schulz step would turn its sign and let it grow.
    """
    bound = row_sum(product)
    scale = jnp.where(bound > 2, jax.lax.rsqrt(bound), 1)
    return blocks * over_blocks(scale, blocks), product * over_blocks(scale**2, product)


def _polar(blocks, identity, step, attraction):
    del attraction
    blocks = blocks + _tangent(blocks, identity, step)
    return newton_schulz(*_within_reach(blocks, gram(blocks)), identity)


def _qr(blocks, identity, step, attraction):
    del attraction
    blocks = blocks + _tangent(blocks, identity, step)
    factor = orthonormal_factor(blocks.reshape((len(blocks), -1, blocks.shape[-1])))
    # In the place of columns of padding, which are the last, QR puts others.
    return (factor * jnp.diagonal(identity, axis1=1, axis2=2)[:, None]).reshape(blocks.shape)


def _pogo(blocks, identity, step, attraction):
    del attraction
    blocks = blocks + _tangent(blocks, identity, step)
    return newton_schulz_step(blocks, gram(blocks))


def _landing(blocks, identity, step, attraction):
    normal = jnp.asarray(attraction, blocks.dtype) * (gram(blocks) - identity)
    return blocks + step - times(blocks, _symmetric(cross_gram(blocks, step)) + normal)


#: What each method makes of blocks and a step, in that order; `blocks` have columns ≤ rows.
METHODS: dict[str, Callable[..., jax.Array]] = {
    "polar": _polar,
    "qr": _qr,
    "pogo": _pogo,
    "landing": _landing,
}
