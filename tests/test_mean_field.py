"""Each rule against its paper's defining property, by other integrals than its own."""

import jax
import numpy as np
import pytest
from scipy import integrate

from orthojax.errors import ConfigError
from orthojax.mean_field import (
    critical_tanh,
    expectation,
    leaky_cosine,
    normalized_tanh_scale,
    shaped_softplus,
    tailored_slope,
)


def mean(function):
    """E[f(z)], adaptively."""

    def integrand(z):
        return function(z) * np.exp(-z * z / 2) / np.sqrt(2 * np.pi)

    return integrate.quad(integrand, -12, 12, limit=400, epsabs=1e-13)[0]


@pytest.mark.parametrize("power", [1, 2, 3, 4, 8])
def test_expectation_of_powers(power):
    """The moments of a standard normal: 0, or the double factorial."""
    wanted = 0 if power % 2 else np.prod(np.arange(power - 1, 0, -2))
    np.testing.assert_allclose(expectation(lambda z: z**power), wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("bias_variance", [1e-7, 2.01e-5, 1e-3, 5e-2])
def test_critical_tanh_is_a_fixed_point_of_slope_one(bias_variance):
    gain, q = critical_tanh(bias_variance)
    root = np.sqrt(q)
    power = gain**2 * mean(lambda z: np.tanh(root * z) ** 2) + bias_variance
    slope = gain**2 * mean(lambda z: np.cosh(root * z) ** -4.0)
    np.testing.assert_allclose([power / q, slope], 1, rtol=1e-8)


def test_critical_tanh_has_the_gain_of_ten_thousand_layers():
    """Xiao et al. (2018) report a weight variance of 1.05 beside this one of the biases."""
    assert round(critical_tanh(2.01e-5)[0] ** 2, 2) == 1.05


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.8, 1.0])
def test_cosine_after_a_leaky_relu(slope):
    generator = np.random.default_rng(1)
    z = generator.normal(size=(2, 2_000_000))
    for cosine in (-0.7, 0.0, 0.4, 0.95):
        pair = z[0], cosine * z[0] + np.sqrt(1 - cosine**2) * z[1]
        a, b = (np.where(x > 0, x, slope * x) * np.sqrt(2 / (1 + slope**2)) for x in pair)
        # Second moments stay 1, so that the cosine is the product's mean.
        np.testing.assert_allclose(np.mean(a * a), 1, rtol=5e-3)
        np.testing.assert_allclose(np.mean(a * b), leaky_cosine(cosine, slope), atol=4e-3)


@pytest.mark.parametrize(("layers", "cosine"), [(20, 0.9), (109, 0.9), (109, 0.5), (1003, 0.9)])
def test_tailored_slope_ends_at_the_cosine(layers, cosine):
    slope, c = tailored_slope(layers, cosine), 0.0
    for _ in range(layers):
        c = leaky_cosine(c, slope)
    assert 0 < slope < 1
    np.testing.assert_allclose(c, cosine, rtol=1e-8)


def test_a_relu_is_enough_for_few_layers():
    assert tailored_slope(2) == 0


@pytest.mark.parametrize("layers", [5, 43, 109, 1003])
def test_shaped_softplus_has_the_four_properties(layers):
    form = shaped_softplus(layers)

    def value(z):
        return form.outer * (np.logaddexp(0, form.inner * z + form.shift) + form.offset)

    def derivative(z):
        return form.outer * form.inner / (1 + np.exp(-form.inner * z - form.shift))

    found = [
        mean(value),
        mean(lambda z: value(z) ** 2),
        mean(lambda z: z * value(z) * derivative(z)),
        mean(lambda z: derivative(z) ** 2) ** layers,
    ]
    np.testing.assert_allclose(found, [0, 1, 1, 1.5], atol=1e-6)


@pytest.mark.parametrize("layers", [43, 109, 1003])
def test_growth_of_a_normalized_tanh(layers):
    """By autodiff through batch normalization: one layer of width 64, 40,000 inputs, float64."""
    scale = normalized_tanh_scale(layers)
    with jax.enable_x64(True):
        generator = np.random.default_rng(2)
        x = generator.normal(size=(40_000, 64))
        weights = np.linalg.qr(generator.normal(size=(64, 64)))[0]

        def layer(x):  # from what one batch normalization puts out to what the next one does
            y = jax.numpy.tanh(scale * x) @ weights
            return (y - y.mean(0)) / y.std(0)

        error = generator.normal(size=x.shape)
        below = jax.vjp(layer, x)[1](error)[0]
        growth = float((below**2).mean()) / float((error**2).mean())
    np.testing.assert_allclose(growth, 6.8 ** (1 / layers), rtol=3e-3)


@pytest.mark.parametrize(
    ("rule", "arguments", "name"),
    [
        (critical_tanh, (0.0,), "bias_variance=0.0"),
        (tailored_slope, (0,), "layers=0"),
        (tailored_slope, (10, 1.0), "cosine=1.0"),
        (shaped_softplus, (10, 1.0), "slope=1.0"),
        (normalized_tanh_scale, (10, 0.5), "growth=0.5"),
    ],
)
def test_what_is_out_of_range_is_named(rule, arguments, name):
    with pytest.raises(ConfigError, match=name):
        rule(*arguments)


def test_a_critical_tanh_net_keeps_both_moments():
    """100 random orthogonal layers of width 200, float64."""
    gain, q = critical_tanh(1e-3)
    generator = np.random.default_rng(0)
    x, layers = np.sqrt(q) * generator.normal(size=(50, 200)), []
    for _ in range(100):
        weights = gain * np.linalg.qr(generator.normal(size=(200, 200)))[0]
        layers.append((x, weights))
        x = np.tanh(x) @ weights + 1e-3**0.5 * generator.normal(size=200)
    np.testing.assert_allclose(np.mean(x**2), q, rtol=0.15)
    error = start = generator.normal(size=x.shape)
    for x, weights in reversed(layers):
        error = (error @ weights.T) / np.cosh(x) ** 2
    assert 0.5 < np.mean(error**2) / np.mean(start**2) < 2
