r"""Activations and variances that a deep net without batch normalization needs at initialization.

As the width grows, a layer of a net at initialization maps the second moment q of what it is given
and the cosine c of two inputs. For weights of variance :math:`\sigma_w^2 / f_{in}` (or
:math:`\sigma_w` times an orthogonal matrix), biases of variance :math:`\sigma_b^2` and an
activation :math:`\phi`,

.. math::
   Q(q) = \sigma_w^2 \, E[\phi(\sqrt q z)^2] + \sigma_b^2, \qquad
   \chi = \sigma_w^2 \, E[\phi'(\sqrt q z)^2], \qquad z \sim N(0, 1),

and :math:`\chi` is what the squared error is multiplied with on its way down. Each rule here solves
for the activation or the variances at which a whole net stays tame. They are other people's; a net
of this project has batch normalization and `orthojax.isometry.isometric_bias`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import optimize, special

from orthojax import checks
from orthojax.errors import ConfigError

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(201)
_WEIGHTS = _WEIGHTS / math.sqrt(2 * math.pi)

# A softplus that bends more sharply falls between the nodes.
_SHARPEST = 10.0

#: Of a net whose slope is solved for layer by layer: some seconds.
MOST_LAYERS = 100_000


def expectation(function: Callable[[np.ndarray], np.ndarray]) -> float:
    """E[f(z)] of a smooth f and a standard normal z, in float64, by Gauss-Hermite quadrature.

    Raises:
      ConfigError: `function` cannot be called.

    Example:
      >>> round(expectation(np.square), 12)
      1.0
    """
    checks.function("function", function, "a function of an array")
    return float(_WEIGHTS @ function(_NODES))


def critical_tanh(bias_variance: float) -> tuple[float, float]:
    r"""Where a tanh net neither explodes nor vanishes: :math:`\chi = 1` at :math:`Q(q) = q`.

    Args:
      bias_variance: :math:`\sigma_b^2`, from 1e-9 to 0.1. The smaller, the more linear the net, and
        the deeper it may be.

    Returns:
      :math:`\sigma_w`, the singular value of the kernels, and the q that the net then keeps.

    Source: Xiao et al. 2018, arXiv:1806.05393, section 2.

    Raises:
      ConfigError: the variance is out of its range.

    Example:
      >>> gain, q = critical_tanh(2.01e-5)  # of the 10,000 layers of Xiao et al.
      >>> round(gain**2, 2), round(q, 3)
      (1.05, 0.026)
    """
    checks.number("bias_variance", bias_variance, "[1e-9, 0.1]")

    def gain_squared(q):
        return 1 / expectation(lambda z: np.cosh(np.sqrt(q) * z) ** -4.0)

    def missing(log_q):
        q = math.exp(log_q)
        power = expectation(lambda z: np.tanh(np.sqrt(q) * z) ** 2)
        return math.log((q - gain_squared(q) * power) / bias_variance)

    q = math.exp(optimize.brentq(missing, math.log(1e-5), math.log(2.0), xtol=1e-12))
    return math.sqrt(gain_squared(q)), q


def normalized_tanh_scale(layers: int, growth: float = 6.8) -> float:
    r"""The BN scale at which the squared error of a tanh net grows by `growth` over so many layers.

    Batch normalization divides by the standard deviation of what the tanh below it lets through, so
    that the error grows by :math:`\gamma^2 E[\phi'(\gamma z)^2] / E[\phi(\gamma z)^2]` per layer.
    A small scale keeps the tanh where it is nearly linear.

    Source: the near-linear activations of Meterez et al. 2023, arXiv:2310.02012.

    Args:
      layers: at least 1.
      growth: more than 1.

    Raises:
      ConfigError: an argument is out of its range.

    Example:
      >>> round(normalized_tanh_scale(109), 2)
      0.4
    """
    checks.integer("layers", layers, 1)
    checks.number("growth", growth, "(1, inf)")

    def missing(log_scale):
        scale = math.exp(log_scale)
        slope = expectation(lambda z: np.cosh(scale * z) ** -4.0)
        power = expectation(lambda z: np.tanh(scale * z) ** 2)
        return layers * math.log(scale**2 * slope / power) - math.log(growth)

    low, high = math.log(1e-4), math.log(2.0)
    return 2.0 if missing(high) <= 0 else math.exp(optimize.brentq(missing, low, high, xtol=1e-10))


def leaky_cosine(cosine: np.ndarray | float, slope: float) -> np.ndarray:
    r"""The cosine of two inputs after a leaky ReLU, for that before it.

    .. math:: C(c) = c + \frac{(1 - a)^2}{\pi (1 + a^2)} (\sqrt{1 - c^2} - c \arccos c)

    Args:
      cosine: c, from -1 to 1.
      slope: a, that of the negative part.

    Raises:
      ConfigError: an argument is out of its range.
    """
    try:
        c = np.asarray(cosine)
    except (TypeError, ValueError):  # lists that are no array
        c = np.asarray(None)
    if c.dtype.kind not in "iuf" or not (np.abs(c) <= 1 + 1e-6).all():
        raise checks.refuse("cosine", cosine, "numbers in [-1, 1]")
    checks.number("slope", slope, "[-1e150, 1e150]")
    c = np.clip(c.astype(np.float64), -1, 1)  # rounding
    bend = (1 - slope) ** 2 / (math.pi * (1 + slope**2))
    return c + bend * (np.sqrt(1 - c**2) - c * np.arccos(c))


def tailored_slope(layers: int, cosine: float = 0.9) -> float:
    """The slope of a leaky ReLU at which orthogonal inputs leave so many layers with `cosine`.

    With 1 every net is linear, with 0 the inputs of a deep one become equal. This is "tailored
    activation transformation" (TAT) for a chain; the activation is `sqrt(2 / (1 + a²))` times the
    leaky ReLU, which keeps second moments.

    Source: Zhang et al. 2022, arXiv:2203.08120, section 4.2.

    Args:
      layers: from 1 to 100,000.
      cosine: between 0 and 1, 0.9 in the paper.

    Raises:
      ConfigError: an argument is out of its range. (If not even a ReLU makes inputs so much alike,
        the slope is 0.)

    Example:
      >>> round(tailored_slope(109), 3)
      0.586
    """
    checks.integer("layers", layers, 1, MOST_LAYERS)
    checks.number("cosine", cosine, "(0, 1)")

    def at_the_end(slope):
        c, bend = 0.0, (1 - slope) ** 2 / (math.pi * (1 + slope**2))
        for _ in range(layers):
            c = min(1.0, c + bend * (math.sqrt(1 - c**2) - c * math.acos(c)))
        return c - cosine

    return 0.0 if at_the_end(0.0) <= 0 else optimize.brentq(at_the_end, 0.0, 1.0, xtol=1e-12)


@dataclasses.dataclass(frozen=True)
class Shaped:
    """`outer · (softplus(inner · x + shift) + offset)`, with the numbers of `shaped_softplus`.

    Called with x, and with `jnp.logaddexp` where that is a JAX array.

    Raises:
      ConfigError: one of the numbers is none, or not finite.
    """

    inner: float
    shift: float
    outer: float = 1.0
    offset: float = 0.0

    def __post_init__(self):
        for name in ("inner", "shift", "outer", "offset"):
            checks.number(name, getattr(self, name))

    def __call__(self, x: Any, logaddexp: Callable = np.logaddexp) -> Any:
        return self.outer * (logaddexp(self.inner * x + self.shift, 0.0) + self.offset)


def shaped_softplus(layers: int, slope: float = 1.5) -> Shaped:
    r"""A softplus that keeps second moments, and the cosines of inputs, over so many layers.

    For :math:`\hat\phi` it holds that :math:`E[\hat\phi(z)^2] = 1`, and so near 1:
    :math:`E[z \hat\phi \hat\phi'] = 1`; that orthogonal inputs stay so, :math:`E[\hat\phi] = 0`;
    and that the map of cosines has the slope :math:`E[\hat\phi'^2] = slope^{1/layers}` at 1. This
    is "deep kernel shaping" (DKS) for a chain.

    Source: Martens et al. 2021, arXiv:2110.01765.

    Args:
      layers: at least 1; with the paper's slope at least 2.
      slope: of the whole net, more than 1; 1.5 in the paper.

    Raises:
      ConfigError: an argument is out of its range, or no softplus does that.

    Example:
      >>> shaped_softplus(109).inner < 0.5
      True
    """
    checks.integer("layers", layers, 1)
    checks.number("slope", slope, "(1, inf)")

    def shaped(inner, shift):
        form = Shaped(inner, shift)
        form = dataclasses.replace(form, offset=-expectation(form))
        return dataclasses.replace(form, outer=expectation(lambda z: form(z) ** 2) ** -0.5)

    def missing(unknowns):
        form = shaped(math.exp(unknowns[0]), unknowns[1])

        def derivative(z):
            return form.outer * form.inner * special.expit(form.inner * z + form.shift)

        local = expectation(lambda z: derivative(z) ** 2) - 1
        moment = expectation(lambda z: z * form(z) * derivative(z)) - 1
        # Both are small where the net is deep: on the scale of what is wanted.
        return [math.log(local / wanted), moment / wanted]

    wanted = math.expm1(math.log(slope) / layers)
    guess = [math.log(min(1.0, 3 * math.log(slope) / layers + 0.1)), 0.5]
    try:
        found = optimize.root(missing, guess, tol=1e-11)
        solved = np.abs(found.fun).max() <= 1e-6 and found.x[0] <= math.log(_SHARPEST)
    except (ValueError, OverflowError):  # beyond what a double tells from a straight line
        solved = False
    if not solved:
        raise ConfigError(
            f"no softplus is found for layers={layers}, slope={slope}: a net of few layers and a"
            " steep slope needs a kink, and one of very many is linear to rounding; take a slope"
            " nearer to 1.5, or another number of layers"
        )
    return shaped(math.exp(found.x[0]), float(found.x[1]))
