r"""Near-isometric initialization: how fast the error of a plain net grows, and how to tame it.

At initialization, with kernels that are isometries (`orthojax.delta_orthonormal`), the squared
error of a Conv-BN-ReLU net grows on its way down by

.. math:: g(\beta) = \frac{\Phi(\beta)}{\mathrm{Var}[\mathrm{ReLU}(N(\beta, 1))]}

per layer, as the width and the batch grow, where :math:`\beta` is the bias of batch normalization
and :math:`\Phi` the normal distribution function: the ReLU lets a share :math:`\Phi(\beta)` of the
error pass, and the batch normalization above it divides by the standard deviation of what the ReLU
lets through of :math:`N(\beta, 1)`. Without a bias that is :math:`\pi / (\pi - 1) = 1.467` (Yang et
al. 2019, arXiv:1902.08129); it falls to 1 as the bias grows and the ReLU becomes linear. The bias
is not in Xie et al. (2017), whose nets start at zero.

Layers that change the shape are no exception: if the columns of their kernel are orthonormal, the
norm of the error grows as elsewhere. (Its second moment, a mean over elements, changes besides as
their number does: by 1/2 where a stride of 2 doubles the channels.) At the first layer, whose input
is the image and not what a ReLU let through, the growth is :math:`\Phi(\beta)`.
"""

import math

from orthojax import checks

_LARGEST_BIAS = 8.0  # where the growth per layer is 1 to within a double's precision
_LIMIT = 37.0  # beyond which the tail of the normal distribution is not a double


def error_growth(bias: float) -> float:
    r"""Growth :math:`g(\beta)` of the squared error per Conv-BN-ReLU layer at initialization.

    Args:
      bias: :math:`\beta`, of batch normalization, at least -37: below, no double holds what passes.

    Raises:
      ConfigError: the bias is out of its range.

    Example:
      >>> [round(error_growth(bias), 3) for bias in (0.0, 1.0, 2.0)]
      [1.467, 1.12, 1.018]
    """
    checks.number("bias", bias, f"[{-_LIMIT}, inf)")
    return passed_share(bias) / relu_variance(bias)


def passed_share(bias: float) -> float:
    r""":math:`\Phi(\beta)`, the share of :math:`N(\beta, 1)` that a ReLU lets pass.

    Raises:
      ConfigError: the bias is no finite number.
    """
    checks.number("bias", bias)
    return math.erfc(-bias / math.sqrt(2)) / 2


def relu_variance(bias: float) -> float:
    r""":math:`\mathrm{Var}[\mathrm{ReLU}(N(\beta, 1))]`.

    Raises:
      ConfigError: the bias is no finite number.

    Example:
      >>> round(relu_variance(0.0), 4)  # (1 - 1/π) / 2
      0.3408
    """
    checks.number("bias", bias)
    bias = max(-_LIMIT, min(_LIMIT, float(bias)))
    if bias < 0:  # directly, where the complement would be nearly all of it
        density = math.exp(-(bias**2) / 2) / math.sqrt(2 * math.pi)
        passed = passed_share(bias)
        mean = density + bias * passed
        return (bias**2 + 1) * passed + bias * density - mean**2
    density = math.exp(-(bias**2) / 2) / math.sqrt(2 * math.pi)
    # With the complement of ReLU, max(-z, 0), whose moments vanish as the bias grows: so there is
    # no difference of large numbers. ReLU(z) = z + c, Var = 1 + Var[c] + 2 Cov[z, c].
    blocked = math.erfc(bias / math.sqrt(2)) / 2
    mean = density - bias * blocked
    square = (bias**2 + 1) * blocked - bias * density
    return 1 + (square - mean**2) - 2 * blocked


def isometric_bias(layers: int, growth: float = 6.8) -> float:
    r"""The BN bias at which the squared error grows by `growth` over so many layers.

    The solution of :math:`g(\beta)^{layers} = growth`. A larger bias would make the net more linear
    than it needs to be.

    Args:
      layers: Conv-BN-ReLU layers on the way, at least 1.
      growth: of the squared error from the top to the bottom, more than 1; 6.8 is a bias of 2 at
        110 layers.

    Returns:
      :math:`\beta`, at least 0, which is enough where the error grows by less anyway.

    Raises:
      ConfigError: an argument is out of its range.

    Example:
      >>> bias = isometric_bias(110)
      >>> round(bias, 2), round(error_growth(bias) ** 110, 6)
      (2.0, 6.8)
      >>> isometric_bias(5)
      0.0
    """
    checks.integer("layers", layers, 1)
    checks.number("growth", growth, "(1, inf)")
    wanted = math.log(growth) / layers
    low, high = 0.0, _LARGEST_BIAS
    if math.log(error_growth(low)) <= wanted:
        return low
    while high - low > 1e-12:  # the growth falls with the bias
        middle = (low + high) / 2
        if math.log(error_growth(middle)) > wanted:
            low = middle
        else:
            high = middle
    return high
