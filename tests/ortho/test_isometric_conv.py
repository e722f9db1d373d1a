"""Convolutions that are isometries: singular values of the operator, gradients, padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthojax.errors import ConfigError
from orthojax.ortho.isometric_conv import (
    cayley,
    isometric_conv,
    isometric_kernel,
    max_min,
    parameter_shapes,
)

# window, inputs, outputs
STRIDE_ONE = [
    ((3, 3), 3, 8),
    ((2, 4), 6, 4),
    ((1, 1), 5, 3),
    ((5,), 4, 7),
    ((3, 3, 3), 2, 4),
]
# window, inputs, outputs, strides, groups
STRIDED_AND_GROUPED = [
    ((3, 3), 2, 12, (2, 2), 1),
    ((3, 3), 4, 6, (2, 2), 1),
    ((2, 2), 3, 12, (2, 2), 1),
    ((3, 3), 4, 4, (1, 1), 4),
    ((3, 5), 4, 16, (2, 1), 2),
    ((5,), 3, 9, (3,), 1),
]
compiled_kernel = jax.jit(isometric_kernel, static_argnums=(2, 3, 4, 5))
compiled_conv = jax.jit(isometric_conv, static_argnums=(2, 3, 4))


def kernel_of(window, inputs, outputs, strides, groups=1):
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(window, inputs, outputs, strides, groups)
    parameters = [rng.standard_normal(shape, np.float32) for shape in shapes]
    return compiled_kernel(*parameters, window, inputs, outputs, strides)


@pytest.mark.parametrize(("window", "inputs", "outputs"), STRIDE_ONE, ids=str)
def test_singular_values_by_fft(window, inputs, outputs):
    kernel = np.asarray(kernel_of(window, inputs, outputs, (1,) * len(window)), np.float64)
    assert kernel.shape == (*window, inputs, outputs)
    # One tap alone would be no convolution.
    assert np.sum(np.abs(kernel).max(axis=(-1, -2)) > 1e-3) > 1 or max(window) == 1
    axes = tuple(range(len(window)))
    transfer = np.fft.fftn(kernel, s=(7,) * len(window), axes=axes)
    values = np.linalg.svd(transfer.reshape(-1, inputs, outputs), compute_uv=False)
    np.testing.assert_allclose(values, 1, atol=1e-5)


def operator(kernel, sides, inputs, strides, padding, groups):
    """The matrix of the convolution, row by row: what it makes of every unit image."""
    size = int(np.prod(sides)) * inputs
    units = np.eye(size, dtype=np.float32).reshape((size, *sides, inputs))
    return np.asarray(compiled_conv(units, kernel, strides, padding, groups)).reshape(size, -1)


@pytest.mark.parametrize("case", STRIDED_AND_GROUPED, ids=str)
def test_singular_values_of_the_operator(case):
    window, inputs, outputs, strides, groups = case
    sides = tuple(4 * s if s < 3 else 2 * s for s in strides)
    kernel = kernel_of(window, inputs, outputs, strides, groups)
    circular = operator(kernel, sides, inputs, strides, "CIRCULAR", groups)
    values = np.linalg.svd(circular, compute_uv=False)
    np.testing.assert_allclose(values, 1, atol=1e-5)
    assert len(values) == min(circular.shape)
    zeros = operator(kernel, sides, inputs, strides, "SAME", groups)
    values = np.linalg.svd(zeros, compute_uv=False)
    assert values.max() < 1 + 1e-5
    if kernel.shape[0] > strides[0]:
        assert values.min() < 0.99


@pytest.mark.parametrize("sides", [(2, 3), (1, 1)], ids=str)
def test_windows_larger_than_the_image_wrap_around(sides):
    kernel = kernel_of((5, 5), 3, 4, (1, 1))
    matrix = operator(kernel, sides, 3, (1, 1), "CIRCULAR", 1)
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(len(matrix)), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0, 300.0])
@pytest.mark.parametrize("shape", [(8, 8), (9, 4), (3, 5, 2), (4, 0)], ids=str)
def test_cayley_is_orthonormal_for_matrices_of_any_size(shape, scale):
    matrices = scale * np.random.default_rng(1).standard_normal(shape, np.float32)
    q = np.asarray(jax.jit(cayley)(matrices))
    gram = np.swapaxes(q, -1, -2) @ q
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(shape[-1]), gram.shape), atol=1e-5)


def test_cayley_of_a_skew_matrix_is_the_transform():
    skew = np.random.default_rng(2).normal(size=(5, 5))
    whole = skew - skew.T
    expected = (np.eye(5) - whole) @ np.linalg.inv(np.eye(5) + whole)
    np.testing.assert_allclose(cayley(jnp.asarray(skew, jnp.float32)), expected, atol=1e-5)


def test_gradients_are_those_of_finite_differences():
    window, inputs, outputs, strides = (3, 2), 2, 6, (1, 2)
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        shapes = parameter_shapes(window, inputs, outputs, strides)
        parameters = [rng.normal(size=shape) for shape in shapes]
        x = rng.normal(size=(2, 4, 4, inputs))
        weights = rng.normal(size=(2, 4, 2, outputs))

        @jax.jit
        def loss(*parameters):
            kernel = isometric_kernel(*parameters, window, inputs, outputs, strides)
            return jnp.sum(weights * isometric_conv(x, kernel, strides))

        gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(*parameters)
        for number, gradient in enumerate(gradients):
            for _ in range(3):
                direction = rng.normal(size=gradient.shape)
                ends = []
                for sign in (1e-6, -1e-6):
                    moved = list(parameters)
                    moved[number] = moved[number] + sign * direction
                    ends.append(loss(*moved))
                slope = (ends[0] - ends[1]) / 2e-6
                np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-6)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 1e-3 for g in gradients)


def test_gradients_at_zero_parameters_are_finite():
    shapes = parameter_shapes((3, 3), 3, 4, (1, 1))
    loss = lambda *p: jnp.sum(isometric_kernel(*p, (3, 3), 3, 4, (1, 1)) ** 3)  # noqa: E731
    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)))(*map(np.zeros, shapes))
    assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_max_min_keeps_norms_and_sorts():
    x = jax.random.normal(jax.random.key(0), (5, 6))
    y = max_min(x)
    np.testing.assert_array_equal(jnp.sort(x, axis=-1), jnp.sort(y, axis=-1))
    assert bool((y[:, :3] >= y[:, 3:]).all())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: parameter_shapes((3, 3), 4, 6, (1, 1), 4), "outputs=6 cannot.*feature_groups=4"),
        (lambda: parameter_shapes((3, 3), 4, 4, (1,)), "window=.3, 3. and strides=.1,."),
        (lambda: parameter_shapes((0,), 4, 4, (1,)), "window=.0,. must be integers from 1"),
        (lambda: max_min(jnp.ones(3)), "an odd number of channels"),
        (
            lambda: isometric_kernel(jnp.ones((1, 1, 2, 1)), jnp.eye(2)[None], (3,), 2, 2, (1,)),
            "needs .*1, 2, 2, 1",
        ),
        (
            lambda: isometric_conv(jnp.ones((1, 4, 4, 2)), jnp.ones((3, 3, 2, 2)), padding="VALID"),
            "padding='VALID'.*CIRCULAR",
        ),
        (
            lambda: isometric_conv(jnp.ones((1, 5, 4, 2)), jnp.ones((2, 2, 2, 2)), (2, 2)),
            "sides .5, 4.*SAME",
        ),
    ],
)
def test_bad_arguments(function, message):
    with pytest.raises(ConfigError, match=message):
        function()
