"""The layer of isometric convolutions: norms forward and backward, and 16 bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthojax.models import OrthogonalConv


def test_the_layer_keeps_norms_of_signals_and_cotangents():
    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    layer = OrthogonalConv(12, (3, 3), strides=2)
    y, variables = jax.jit(layer.init_with_output)(jax.random.key(1), x)
    assert y.shape == (2, 3, 3, 12)
    assert sorted(variables["params"]) == ["bias", "mixing", "projectors"]
    np.testing.assert_allclose(np.linalg.norm(y), np.linalg.norm(x), rtol=1e-5)
    cotangent = np.random.default_rng(2).standard_normal(y.shape, np.float32)
    back = jax.jit(lambda x, c: jax.vjp(lambda x: layer.apply(variables, x), x)[1](c)[0])
    norms = [np.linalg.norm(a) for a in (back(x, cotangent), cotangent)]
    np.testing.assert_allclose(*norms, rtol=1e-5)


def test_the_layer_in_bfloat16():
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 4), jnp.bfloat16)
    y, variables = jax.jit(OrthogonalConv(4, (3, 3)).init_with_output)(jax.random.key(1), x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    norms = [np.linalg.norm(np.asarray(a, np.float64)) for a in (x, y)]
    np.testing.assert_allclose(*norms, rtol=1e-2)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_layer_with_parameters_of_16_bits(dtype):
    x = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    layer = OrthogonalConv(4, (3, 3), param_dtype=dtype)
    y, variables = jax.jit(layer.init_with_output)(jax.random.key(1), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(dtype)}
    np.testing.assert_allclose(*map(np.linalg.norm, (x, y)), rtol=1e-5)
