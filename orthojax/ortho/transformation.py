"""The orthonormality penalty as an optax transformation, coupled and decoupled."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax._src.base import NO_PARAMS_MSG

from orthojax import checks
from orthojax.ortho.kernels import (
    check_selection,
    map_blocks,
    penalized,
    penalized_or_refuse,
)
from orthojax.ortho.penalty import gradient
from orthojax.ortho.views import View
from orthojax.tree_paths import path_name


class OrthoState(NamedTuple):
    """State of `optax_ortho` with a scheduled coefficient: the number of updates so far."""

    count: jax.Array  # type: ignore[assignment]  # int32 scalar


def optax_ortho(
    coefficient: optax.ScalarOrSchedule = 1e-4,
    mask: Any = None,
    *,
    view: View | Any = None,
    grouping: str = "ceil",
) -> optax.GradientTransformation:
    r"""Add the gradient of the orthonormality penalty of every kernel to the updates.

    .. math::
      u \leftarrow u + \nabla_W \frac{\lambda}{2} \sum_g \|W_g^\top W_g - I\|_F^2
        = u + 2 \lambda W_g (W_g^\top W_g - I)

    in closed form: no data, no autodiff, no second backward pass. It takes the place of
    `optax.add_decayed_weights` on kernels (Eq. 3 of the paper); biases and normalization
    parameters get nothing. `orthojax.describe(params)` prints which are which.

    Place in the chain. Before the momentum, as here with SGD, it is the gradient of a penalized
    loss, and momentum `m` sums it up to `1/(1 − m)` times its size like any other gradient:

        optax.chain(optax_ortho(1e-4), optax.sgd(0.1, momentum=0.9))

    Before an adaptive rescaling (Adam) it would be divided by the root of the second moment and
    lose its strength where gradients are large. Put it *between* the rescaling and the learning
    rate; it then bypasses both moments, as weight decay does in AdamW, and still follows the
    learning rate:

        optax.chain(optax.scale_by_adam(), optax_ortho(1e-2), optax.scale_by_learning_rate(1e-3))

    `decoupled_ortho` goes last and does not follow the learning rate either.

    Args:
      coefficient: λ, a number, a scalar array or a schedule (a function of the number of updates).
        Gradient descent on the penalty alone is stable for learning rate × λ < 1/2 near the
        minimum (its curvature there is 4λ).
      mask: As in optax: a tree of booleans with the structure of the parameters or a prefix of it,
        or a function from the parameters to one. `False` exempts a parameter. It cannot add
        one: what the view calls no kernel has no matrix.
      view: Which parameters are kernels and what their axes mean: a tree of `KernelAxes` and `None`
        or a function from the parameters to one, see `orthojax.ortho.views`. For a Flax model take
        `orthojax.linen.axes(net, x)` or `orthojax.nnx.axes(model)`. The default, `views.flax()`,
        reads parameters called `kernel` by rank, with the output last.
      grouping: Column groups of kernels with `f_out > f_in`, see `matrices.group_sizes`.

    Returns:
      An `optax.GradientTransformation`. Its state is `OrthoState` if the coefficient is a schedule,
      `EmptyState` otherwise. Updates keep their dtype; Gram products are computed in float32, in
      float64 for float64 parameters. Leaves that are `None` or `optax.MaskedNode` are passed over.

    Raises:
      ValueError: `update` without `params` (optax's message).
      ConfigError: A coefficient that is negative or no number; an unknown grouping; an
        invalid mask or view; by `init`, a parameter whose axes the view cannot tell, with its path
        and shape, or no kernel among the parameters at all.

    With `optax.inject_hyperparams`, name the arguments that are functions in `static_args`
    (`"view"`, `"mask"`): it takes functions for schedules.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"kernel": jnp.array([[2.0, 0.0], [0.0, 1.0]]), "bias": jnp.ones(2)}
      >>> ortho = optax_ortho(0.1)
      >>> zero = optax.tree.zeros_like(params)
      >>> updates, _ = ortho.update(zero, ortho.init(params), params)
      >>> updates["kernel"].tolist()  # 2 · 0.1 · 2 · (2² − 1)
      [[1.2000000476837158, 0.0], [0.0, 0.0]]
      >>> updates["bias"].tolist()
      [0.0, 0.0]

    References:
      D. Xie, J. Xiong, S. Pu, `All You Need is Beyond a Good Init
      <https://arxiv.org/abs/1703.01827>`_, 2017.
    """
    return _adding(coefficient, 1, mask, view, grouping)


def decoupled_ortho(
    coefficient: optax.ScalarOrSchedule = 1e-3,
    mask: Any = None,
    *,
    view: View | Any = None,
    grouping: str = "ceil",
) -> optax.GradientTransformation:
    r"""Subtract the penalty's gradient from finished updates: a step of its own, last in the chain.

    .. math::
      u \leftarrow u - 2 \lambda W_g (W_g^\top W_g - I)

    For adaptive optimizers, in the manner of Loshchilov and Hutter (2019, arXiv:1711.05101):

        optax.chain(optax.adam(1e-3), decoupled_ortho(1e-2))

    It comes *after* everything that rescales, negates or remembers: the optimizer's momentum and
    second moments are those of the data's gradient alone, and neither they nor the learning rate
    touch the penalty's step. So λ is a fraction of the way, per update, at which a kernel returns:
    an error `ε` of a singular value near 1 becomes `(1 − 4λ) ε`; 1/4 is one Newton step, 1/2 and
    more diverge. Let it follow the learning rate, if wanted, by giving a schedule.

    For decoupling from the moments *with* the learning rate (as `optax.adamw` decays weights), put
    `optax_ortho` between `scale_by_adam` and `scale_by_learning_rate` instead.

    Before the optimizer this transformation would have the wrong sign; so would `optax_ortho` after
    it.

    Args, returns and errors: see `optax_ortho`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> params = {"kernel": 1.01 * jnp.eye(3)}
      >>> optimizer = optax.chain(optax.adam(1e-3), decoupled_ortho(0.25))
      >>> zero = optax.tree.zeros_like(params)
      >>> updates, _ = optimizer.update(zero, optimizer.init(params), params)
      >>> after = optax.apply_updates(params, updates)["kernel"]
      >>> bool(jnp.abs(after - jnp.eye(3)).max() < 2e-4)
      True
    """
    return _adding(coefficient, -1, mask, view, grouping)


def _adding(coefficient, sign, mask, view, grouping):
    check_selection(mask, view, grouping)
    if not callable(coefficient):
        checks.number("coefficient", coefficient, "[0, inf)", traced=True)

    def init_fn(params):
        # Shapes alone are looked at: a parameter that cannot be read as a matrix is an error now
        # and not in the first update, and so is a tree without kernels.
        penalized_or_refuse(params, mask, view, grouping)
        if callable(coefficient):
            return OrthoState(count=jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update_fn(updates, state, params=None):
        if params is None:
            raise ValueError(NO_PARAMS_MSG)
        scale = coefficient
        if callable(coefficient):
            scale = coefficient(state.count)
            checks.number("coefficient(count)", scale, "[0, inf)", traced=True)
            state = OrthoState(count=optax.safe_increment(state.count))
        elif isinstance(scale, (int, float)) and scale == 0:
            return updates, state
        flat, treedef = jax.tree_util.tree_flatten_with_path(updates, is_leaf=lambda x: x is None)
        # Parameters are found by path; that the trees agree is checked as `jax.tree.map` would.
        treedef.flatten_up_to(params)
        present = {path_name(path) for path, update in flat if update is not None}
        kernels = penalized(params, mask, view, grouping)
        kernels = [(array, kernel) for array, kernel in kernels if kernel.path in present]
        gradients = map_blocks(gradient, kernels)
        added = {k.path: added for (_, k), added in zip(kernels, gradients, strict=True)}
        return treedef.unflatten(
            _add(update, sign * scale, added.get(path_name(path))) for path, update in flat
        ), state

    return optax.GradientTransformation(init_fn, update_fn)


def _add(update, scale, gradient):
    if gradient is None:
        return update
    # Nothing is left to promotion, which `jax_numpy_dtype_promotion="strict"` forbids.
    dtype = jnp.float64 if update.dtype == jnp.float64 else gradient.dtype
    added = jnp.asarray(scale, dtype) * gradient.astype(dtype)
    return (update.astype(dtype) + added).astype(update.dtype)
