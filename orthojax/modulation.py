r"""Modulation: backward rescaling of the error by running second moments.

Xie, Xiong and Pu (CVPR 2017, sections 3.3 and 4) rescale the error on its way down between two
consecutive parametric layers. With :math:`q^l = E[(\delta^l)^2]`, the mean over batch, space and
channels of the squared cotangent at the output of parametric layer :math:`l`, the cotangent that
leaves layer :math:`l` is multiplied by

.. math:: \rho^l = \sqrt{q^{l+1} / q^l},

where :math:`q^{l+1}` is what the layer above handed down. A *site* is one such place, one per
parametric layer. Its forward pass is the identity. Its backward pass multiplies the cotangent by
a scalar taken from the site's *state* and returns, as the "cotangent" of that state, the *new
state* with this step's moments averaged in. So a training step needs no second pass, and no
:math:`\rho` waits for a moment of the same step (nor, on several devices, for its reduction).

Two neighbouring moments are needed at one site. They are brought together by a scalar, the
*link*, that is threaded through the forward pass beside the activations: its value means
nothing, and its cotangent carries the second moment that the site above hands down. That is the
*running* moment out of that site's state, known before the step began: so nothing of this step
travels from site to site, and a loop over layers carries nothing that would first have to be
reduced over devices. The link starts as :func:`first_link`; the topmost site, whose link nobody
consumes, sees a zero and is the reference (:math:`\rho = 1`).

This file is plain JAX; `orthojax.linen.Modulation` is the Flax module.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

MODES = ("running", "direct", "observe")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["decay", "tolerance", "max_scale", "steps", "settle"],
    meta_fields=["mode"],
)
@dataclasses.dataclass(frozen=True)
class Policy:
    r"""When and how strongly a site rescales the cotangent.

    A pytree: every number may be a Python float (a constant of the compiled program) or a traced
    float32 scalar (changed without recompilation). That modulation switches off after `steps` or
    once settled is decided from the state, so it never recompiles either.

    Attributes:
      decay: decay of the running second moments, in [0, 1). The average is a plain mean until
        `1 / (1 - decay)` steps have been measured, so that it has no start-up bias.
      tolerance: a pair is rescaled only where `max(r, 1/r) > 1 + tolerance`, with
        :math:`r = q^{l+1} / q^l`. The paper rescales "only when the magnitudes mismatch" and
        gives no number.
      max_scale: :math:`\rho` is clipped to `[1 / max_scale, max_scale]`.
      steps: modulate during the first `steps` updates only; infinity is always. The paper found
        81.6% with a switch-off against 73.5% without one and gives no number.
      settle: switch a site off for good once the running mean of the change of
        :math:`\log r` from one step to the next falls under this, :math:`r` being the ratio of
        the running moments (in direct mode, of this step's); 0 is never. (The profile of Fig. 4
        settles after 2,000 to 3,000 iterations.)
      mode: `"running"` takes :math:`\rho` from the running moments; `"direct"` from this step's
        (on several devices its backward pass then waits for one reduction per site);
        `"observe"` measures and leaves the cotangent alone. Static.

    Example:
      >>> Policy(steps=2000.0).mode
      'running'
      >>> Policy(mode="sideways")
      Traceback (most recent call last):
      ...
      ValueError: Policy.mode is 'sideways'; it must be one of running, direct, observe
    """

    decay: Any = 0.9
    tolerance: Any = 0.1
    max_scale: Any = 10.0
    steps: Any = float("inf")
    settle: Any = 0.0
    mode: str = "running"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"Policy.mode is {self.mode!r}; it must be one of {', '.join(MODES)}")
        _check(self.decay, "decay", lambda v: 0 <= v < 1, "in [0, 1)")
        _check(self.tolerance, "tolerance", lambda v: v >= 0, "at least 0")
        _check(self.max_scale, "max_scale", lambda v: v >= 1, "at least 1")
        _check(self.steps, "steps", lambda v: v >= 0, "at least 0")
        _check(self.settle, "settle", lambda v: v >= 0, "at least 0")


def _check(value, name, holds, expected):
    # Only Python numbers can be looked at: traced values and tree placeholders pass through.
    if isinstance(value, int | float) and not holds(value):
        raise ValueError(f"Policy.{name} is {value}; it must be {expected}")


class Moments(NamedTuple):
    r"""What the state of a site holds, unpacked: float32, each of the state's leading shape.

    Attributes:
      second_moment: running mean of the squared cotangent that arrived, :math:`q^l`.
      handed_down: running mean of the squared cotangent that left,
        :math:`(\rho^l)^2 q^l`: what the site below compares its own moment with.
      log_ratio: :math:`\log r`, the :math:`r = q^{l+1} / q^l` that the last pass found; 0 where
        it found none (at the top, and in the first pass).
      scale: the :math:`\rho` that the last pass applied.
      drift: running mean of the change of `log_ratio` between passes, absolute.
      settled: 1 once the site has switched itself off, else 0.
      count: number of updates measured.
    """

    second_moment: jax.Array
    handed_down: jax.Array
    log_ratio: jax.Array
    scale: jax.Array
    drift: jax.Array
    settled: jax.Array
    count: jax.Array


def init_state(shape: tuple[int, ...] = ()) -> jax.Array:
    """A fresh state: float32 of shape `(*shape, 7)`, one row per site; see :class:`Moments`.

    A site that has measured nothing applies no scale, so calibrate before the first update
    (see :func:`calibrate`).

    Example:
      >>> init_state().shape, init_state((36,)).shape
      ((7,), (36, 7))
    """
    return jnp.zeros((*shape, len(Moments._fields)), jnp.float32).at[..., _column("scale")].set(1)


def _column(name):
    return Moments._fields.index(name)


def read(state: jax.Array) -> Moments:
    """Names the columns of a state of shape `(..., 7)`.

    Example:
      >>> float(read(init_state()).count)
      0.0
    """
    return Moments(*(state[..., i] for i in range(len(Moments._fields))))


def first_link() -> jax.Array:
    """The link that enters the lowest site: a float32 scalar whose value means nothing."""
    return jnp.zeros((), jnp.float32)


def _log_ratio(above, below):
    """log(above / below), and whether both are finite and positive (0 and False elsewhere)."""
    valid = (above > 0) & (below > 0) & jnp.isfinite(above) & jnp.isfinite(below)
    # A difference of logarithms: the moments of very deep nets span float32's exponents.
    return jnp.log(jnp.where(valid, above, 1)) - jnp.log(jnp.where(valid, below, 1)), valid


def _scale(log_ratio, measured, old, policy):
    """The rho that a site with the state `old` applies to a pair with this ratio."""
    if policy.mode == "observe":
        return jnp.float32(1)
    mismatch = jnp.abs(log_ratio) > jnp.log1p(jnp.float32(policy.tolerance))
    active = (old.count < policy.steps) & (old.settled == 0)
    limit = jnp.log(jnp.float32(policy.max_scale))
    rho = jnp.exp(jnp.clip(log_ratio / 2, -limit, limit))
    return jnp.where(measured & mismatch & active, rho, jnp.float32(1))


def _update(old, below, log_ratio, measured, rho, policy):
    """Averages what one pass measured into a state, given unpacked."""
    handed_down = jnp.square(rho) * below
    # A vanished or overflowed error says nothing about the layers: it leaves the moments alone.
    usable = (below > 0) & jnp.isfinite(below) & jnp.isfinite(handed_down)
    decay = jnp.minimum(jnp.float32(policy.decay), old.count / (old.count + 1))

    def average(before, now):
        return decay * before + (1 - decay) * now

    comparable = measured & (old.log_ratio != 0)
    drift = average(old.drift, jnp.abs(log_ratio - old.log_ratio))
    # Trust the drift only once its average has filled.
    filled = old.count * (1 - jnp.float32(policy.decay)) >= 1
    settles = filled & comparable & (drift < policy.settle)
    new = Moments(
        second_moment=jnp.where(usable, average(old.second_moment, below), old.second_moment),
        handed_down=jnp.where(usable, average(old.handed_down, handed_down), old.handed_down),
        log_ratio=log_ratio,
        scale=rho,
        drift=jnp.where(comparable, drift, old.drift),
        settled=jnp.maximum(old.settled, settles.astype(jnp.float32)),
        count=old.count + 1,
    )
    return jnp.stack(new, axis=-1)


def rescaling(
    below: jax.Array, above: jax.Array, state: jax.Array, policy: Policy
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""What a site does in a backward pass but for multiplying, for layers that do that themselves.

    Args:
      below: second moment of the cotangent that arrived, a float32 scalar.
      above: the cotangent of the link: the second moment that the site above handed down.
      state: of the site, float32 `(7,)`.
      policy: see :class:`Policy`.

    Returns:
      :math:`\rho`, which the cotangent is to be multiplied with; what to return as the cotangent of
      the link; the new state.

    Example:
      >>> rho, _, state = rescaling(jnp.float32(4), jnp.float32(1), init_state(), Policy())
      >>> rho, _, _ = rescaling(jnp.float32(4), jnp.float32(1), state, Policy())
      >>> float(rho)  # the root of 1 / 4
      0.5
    """
    old, direct = read(state), policy.mode == "direct"
    log_ratio, measured = _log_ratio(above, below if direct else old.second_moment)
    rho = _scale(log_ratio, measured, old, policy)
    handed_down = jnp.square(rho) * below if direct else old.handed_down
    return rho, handed_down, _update(old, below, log_ratio, measured, rho, policy)


def modulate(
    x: jax.Array, link: jax.Array, state: jax.Array, policy: Policy = Policy()
) -> tuple[jax.Array, jax.Array]:
    r"""A modulation site: the identity forwards, :math:`\rho \cdot \delta` backwards.

    Put it at the output of a parametric layer, before its normalization:
    `y = conv(x); y, link = modulate(y, link, state)`. Differentiate with respect to `state`
    too: what comes back in the place of its gradient **is the new state** and must replace the
    old one; it must not reach an optimizer. One state per site: autodiff would add up the
    returns of a state used twice. Averaging such gradients over microbatches or devices
    (`jax.lax.pmean`) averages the measured moments, because the running moments are linear in
    what was measured. (A loss that is a mean over 1/k of the batch has errors k times those of
    the joint batch and moments k² times; the ratios, and so the scales, are the same.)

    Args:
      x: activations, any floating dtype and shape.
      link: float32 scalar, from :func:`first_link` or the site below.
      state: float32 `(7,)`, from :func:`init_state`.
      policy: see :class:`Policy`.

    Returns:
      `(x, link)`: the same `x`, and the link for the next site up.

    Raises:
      TypeError: `x` is not floating, or `link` or `state` is not float32 of the shape above.

    Example:
      Two linear layers whose second shrinks the error ten times:

      >>> import jax, jax.numpy as jnp
      >>> def loss(states, x):
      ...     link = first_link()
      ...     x, link = modulate(x, link, states[0])
      ...     x, link = modulate(0.1 * x, link, states[1])
      ...     return x.sum()
      >>> states, x = [init_state(), init_state()], jnp.ones(3)
      >>> states = jax.grad(loss)(states, x)  # the first pass measures
      >>> states, error = jax.grad(loss, argnums=(0, 1))(states, x)  # the second is rescaled
      >>> print(error)
      [1. 1. 1.]
      >>> print(f"{read(states[0]).scale:.3f}")  # by this much
      10.000
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"modulate needs floating activations; x is {x.dtype}")
    expected = (("link", link, ()), ("state", state, (len(Moments._fields),)))
    for name, value, shape in expected:
        if jnp.shape(value) != shape or jnp.result_type(value) != jnp.float32:
            raise TypeError(
                f"modulate needs `{name}` as float32 {shape}; it is "
                f"{jnp.result_type(value)} {jnp.shape(value)}. Start from orthojax.first_link() "
                "and orthojax.init_state(); stacked states belong to a scan or vmap over layers"
            )
    return _site(x, link, state, policy)


@jax.custom_vjp
def _site(x, link, state, policy):
    del state, policy
    return x, link


def _site_forward(x, link, state, policy):
    return (x, link), (state, policy)


def _site_backward(residuals, cotangents):
    state, policy = residuals
    cotangent, above = cotangents
    below = jnp.mean(jnp.square(cotangent.astype(jnp.float32)))
    rho, handed_down, new_state = rescaling(below, above, state, policy)
    rescaled = (rho * cotangent).astype(cotangent.dtype)
    return rescaled, handed_down, new_state, jax.tree.map(jnp.zeros_like, policy)


_site.defvjp(_site_forward, _site_backward)


def calibrate(
    measure: Callable[[Any], Any], moments: Any, *, max_passes: int = 16
) -> tuple[Any, int]:
    """Fills the moments before the first update.

    State that starts at "no scale" lets the first update of a very deep net destroy its weights.
    This runs backward passes without updates until every site has measured a finite moment:
    one pass where the unmodulated error stays within float32, a few where it does not, since
    each pass modulates what the one before it measured and so reaches deeper.

    Args:
      measure: one backward pass: takes the tree of states, returns the tree of new states.
      moments: tree of states, each float32 `(..., 7)`.
      max_passes: give up after this many passes.

    Returns:
      `(moments, passes)`. The moments are those of the last pass alone (what an error on the verge
      of overflow measured would stay in an average for hundreds of steps), and the counts are 0,
      so that `Policy.steps` counts updates.

    Raises:
      FloatingPointError: after `max_passes` some site has still measured nothing.

    Example:
      >>> def loss(state, x):
      ...     return (2 * modulate(x, first_link(), state)[0]).sum()
      >>> state, passes = calibrate(lambda s: jax.grad(loss)(s, jnp.ones(3)), init_state())
      >>> float(read(state).second_moment), float(read(state).count), passes
      (4.0, 0.0, 1)
    """
    for passes in range(1, max_passes + 1):
        moments = jax.tree.map(lambda s: s.at[..., _column("count")].set(0), measure(moments))
        unmeasured = sum(
            int((read(state).second_moment <= 0).sum()) for state in jax.tree.leaves(moments)
        )
        if not unmeasured:
            return moments, passes
    raise FloatingPointError(
        f"after {max_passes} calibration passes {unmeasured} modulation sites have measured no "
        "finite, positive second moment: the loss has no gradient there, or the forward pass is "
        "not finite"
    )
