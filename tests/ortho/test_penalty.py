"""The closed form against `jax.grad` of an independent float64 penalty."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthojax.initializers import orthonormal
from orthojax.matrices import group_sizes
from orthojax.ortho import optax_ortho, ortho_penalty


def reference(kernel, coefficient, grouping):
    """`λ/2 Σ ‖WᵀW − I‖²`, written down from the definition; no code shared with the library."""
    matrix = kernel.reshape(-1, kernel.shape[-1])
    ends = np.cumsum(group_sizes(*matrix.shape, grouping))[:-1]
    excesses = [w.T @ w - jnp.eye(w.shape[1]) for w in jnp.split(matrix, ends, axis=1)]
    return coefficient / 2 * sum(jnp.sum(excess**2) for excess in excesses)


@functools.cache
def compiled(coefficient, grouping="ceil"):
    """Of a kernel: the gradient in closed form, and the penalty with its gradient by autodiff."""
    ortho = optax_ortho(coefficient, grouping=grouping)

    def update(kernel):
        params = {"kernel": kernel}
        zeros = {"kernel": jnp.zeros_like(kernel)}
        return ortho.update(zeros, ortho.init(params), params)[0]["kernel"]

    def penalty(kernel):
        return ortho_penalty({"kernel": kernel}, coefficient, grouping=grouping)

    return jax.jit(update), jax.jit(jax.value_and_grad(penalty))


def relative(found, expected):
    scale = np.abs(np.asarray(expected)).max()
    return np.abs(np.asarray(found, np.float64) - np.asarray(expected)).max() / scale


@pytest.mark.parametrize("shape", [(5, 13), (3, 2, 4, 6)], ids=str)
@pytest.mark.parametrize("grouping", ["ceil", "literal", "none"])
def test_gradient_is_that_of_the_float64_penalty(shape, grouping, record_property):
    values = np.random.default_rng(sum(shape)).normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
    update, penalty_and_gradient = compiled(0.3, grouping)
    with jax.enable_x64(True):
        kernel = jnp.asarray(values)
        expected, gradient = jax.jit(
            jax.value_and_grad(lambda kernel: reference(kernel, 0.3, grouping))
        )(kernel)
        exact = update(kernel)
        penalty, through_autodiff = penalty_and_gradient(kernel)
        assert exact.dtype == penalty.dtype == jnp.float64
    single = update(jnp.asarray(values, jnp.float32))
    errors = {
        "float64": relative(exact, gradient),
        "penalty": relative(penalty, expected),
        "autodiff": relative(through_autodiff, gradient),
        "float32": relative(single, gradient),
    }
    record_property("errors", {dtype: float(error) for dtype, error in errors.items()})
    assert errors.pop("float32") < 1e-5, errors
    assert max(errors.values()) < 1e-13, errors


@pytest.mark.parametrize("shape", [(2, 2, 4, 4), (2, 2, 2, 12)], ids=str)
def test_zero_gradient_at_the_minima(shape):
    kernel = jax.jit(orthonormal(), static_argnums=1)(jax.random.key(1), shape)
    update, penalty_and_gradient = compiled(1.0)
    assert np.abs(update(kernel)).max() < 2e-6
    np.testing.assert_allclose(penalty_and_gradient(kernel)[0], 0, atol=1e-5)


def test_float32_kernels_stay_float32_where_float64_is_enabled():
    with jax.enable_x64(True):
        shapes = jax.eval_shape(
            lambda kernel: [function(kernel) for function in compiled(0.1)],
            jnp.ones((2, 2, 2, 3), jnp.float32),
        )
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
