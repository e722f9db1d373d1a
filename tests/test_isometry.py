"""The theory of near-isometric initialization, against quadrature and against a net."""

import math

import numpy as np
import pytest

from orthojax.errors import ConfigError
from orthojax.isometry import error_growth, isometric_bias, passed_share, relu_variance


@pytest.mark.parametrize("bias", [-0.5, 0.0, 0.3, 1.0, 2.0, 3.5])
def test_growth_is_what_quadrature_gives(bias):
    z = np.linspace(-12, 12, 2_400_001)
    weight = np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * (z[1] - z[0])
    passed = np.maximum(z + bias, 0)
    variance = np.sum(weight * passed**2) - np.sum(weight * passed) ** 2
    expected = np.sum(weight * (z + bias > 0)) / variance
    assert error_growth(bias) == pytest.approx(expected, rel=1e-5)


def test_growth_without_a_bias_is_that_of_yang_et_al():
    assert error_growth(0.0) == pytest.approx(math.pi / (math.pi - 1), rel=1e-14)


@pytest.mark.parametrize("layers", [20, 43, 109, 1003])
@pytest.mark.parametrize("growth", [1.5, 10.0, 1e4])
def test_the_bias_solves_its_equation(layers, growth):
    bias = isometric_bias(layers, growth)
    if bias == 0:
        assert error_growth(0) ** layers <= growth
    else:
        assert error_growth(bias) ** layers == pytest.approx(growth, rel=1e-6)


def test_impossible_arguments_are_refused():
    for arguments, name in (((0, 10.0), "layers=0"), ((10, 1.0), "growth=1.0")):
        with pytest.raises(ConfigError, match=name):
            isometric_bias(*arguments)


def test_any_bias_has_a_share_and_a_variance():
    """Those of a trained net may be anything."""
    for bias, share, variance in (
        (1e200, 1.0, 1.0),
        (-1e200, 0.0, 0.0),
        (np.float32(0), 0.5, 0.34),
    ):
        assert passed_share(bias) == share
        np.testing.assert_allclose(relu_variance(bias), variance, atol=1e-2)
