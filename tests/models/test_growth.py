"""The measured growth of the error, against the theory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthojax.isometry import error_growth
from orthojax.models import PlainNet, in_order
from orthojax.models.growth import log_growth
from orthojax.sites import SITE


def test_a_net_at_initialization_grows_as_the_theory_says():
    """Second moments, per element: see the module's docstring; padding loses some taps."""
    images = jax.random.normal(jax.random.key(5), (64, 16, 16, 3))
    net = PlainNet(depth=14, width=32, num_classes=10, kernel_init="delta_orthonormal")
    grow = jax.jit(lambda key, bias: log_growth(net.clone(bn_bias=bias), key, images))
    first_entry, second_entry = 4, 8  # from the last convolution of a stage to the next's first
    for bias in (0.0, 0.5, 1.0, 2.0):
        found = np.mean([np.exp(grow(jax.random.key(seed), bias)) for seed in range(3)], axis=0)
        passed = math.erfc(-bias / math.sqrt(2)) / 2
        # "SAME" padding of images of size n at stride 2 lets one row of taps in 3/2 n fall outside.
        expected = {
            0: passed / (1 - 2 / (3 * 16)) ** 2,
            first_entry: error_growth(bias) / 2 * (1 - 2 / (3 * 16)) ** 2,
            second_entry: error_growth(bias) / 2 * (1 - 2 / (3 * 8)) ** 2,
        }
        # Within the first stage, the layers are alike.
        assert np.exp(np.mean(np.log(found[1:4]))) == pytest.approx(error_growth(bias), rel=0.03)
        for layer, value in expected.items():
            assert found[layer] == pytest.approx(value, rel=0.08), (bias, layer)


def test_growth_is_that_of_the_unmodulated_error():
    net = PlainNet(depth=8, width=2, num_classes=5, kernel_init="orthonormal", bn_bias=0.5)
    images = jax.random.normal(jax.random.key(1), (4, 4, 4, 3))
    found = log_growth(net, jax.random.key(0), images)
    observed = net.clone(modulated=True)

    @jax.jit
    def errors(key):
        variables = observed.init(key, images[:1], train=False)

        def loss(params):
            state = {**variables, "params": params}
            logits, _ = observed.apply(state, images, train=True, mutable=["batch_stats"])
            return jnp.sum(logits * jax.random.normal(jax.random.fold_in(key, 1), logits.shape))

        return jax.grad(loss)(variables["params"])

    grads = in_order(errors(jax.random.key(0)))
    squares = np.log([leaf[0] for path, leaf in grads if path.endswith(SITE)])
    np.testing.assert_allclose(found, squares[:-1] - squares[1:], rtol=1e-3, atol=1e-4)


def test_growth_does_not_overflow_where_the_error_would():
    """1.467^300 is 1e50: beyond float32."""
    net = PlainNet(depth=302, width=8, kernel_init="delta_orthonormal", scan=True)
    images = jax.random.normal(jax.random.key(1), (16, 4, 4, 3))
    found = log_growth(net, jax.random.key(0), images)
    assert jnp.isfinite(found).all() and jnp.sum(found) > math.log(1e38)
