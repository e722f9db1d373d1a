"""Every variant against `jax.grad` of an independent float64 penalty, and one common suite."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthojax.errors import ConfigError
from orthojax.initializers import delta_orthonormal, orthonormal
from orthojax.matrices import KernelAxes, default_axes, group_sizes
from orthojax.ortho import (
    SRIP,
    VARIANTS,
    Layout,
    MutualCoherence,
    optax_ortho,
    ortho_penalty,
)

SHAPES = [(5, 12), (3, 2, 4, 6)]


def excess(matrix):
    return matrix.T @ matrix - jnp.eye(matrix.shape[1])


def off_diagonal_cosines(matrix):
    unit = matrix / jnp.linalg.norm(matrix, axis=0)
    return (unit.T @ unit) * (1 - jnp.eye(matrix.shape[1]))


def conv_reference(kernel, stride=1):
    """The sum over overlapping windows, displacement by displacement (OCNN, with its constant)."""
    *window, channels, outputs = kernel.shape
    total = 0.0
    for step in itertools.product(*(range(-((k - 1) // stride), k) for k in window)):
        shift = [stride * d for d in step]
        if any(abs(d) >= k for d, k in zip(shift, window, strict=True)):
            continue
        here = tuple(slice(max(0, -d), k - max(0, d)) for d, k in zip(shift, window, strict=True))
        there = tuple(slice(max(0, d), k - max(0, -d)) for d, k in zip(shift, window, strict=True))
        product = kernel[here].reshape(-1, outputs).T @ kernel[there].reshape(-1, outputs)
        total += jnp.sum((product - jnp.eye(outputs) * (not any(step))) ** 2)
    seen = channels * math.prod(min(stride, k) for k in window)
    return total - max(0, outputs - seen)


# P of one matrix (one column group); `conv` sees the kernel as it is.
PENALTIES = {
    "frobenius": lambda w: jnp.sum(excess(w) ** 2),
    "double": lambda w: jnp.sum(excess(w) ** 2) + jnp.sum(excess(w.T) ** 2),
    "mutual_coherence": lambda w: jnp.max(jnp.abs(excess(w))) ** 2,
    "srip": lambda w: jnp.linalg.norm(excess(w), 2) ** 2,
    "cosine": lambda w: jnp.sum(off_diagonal_cosines(w) ** 2),
}


def reference(name, kernel, coefficient):
    """`λ/2 Σ P`, written down from the definition; no code shared with the library."""
    if name == "conv":
        return coefficient / 2 * conv_reference(kernel)
    matrix = kernel.reshape(-1, kernel.shape[-1])
    sizes = (matrix.shape[1],)
    if name != "double":
        sizes = group_sizes(*matrix.shape, "ceil")
    groups = jnp.split(matrix, np.cumsum(sizes)[:-1], axis=1)
    return coefficient / 2 * sum(PENALTIES[name](group) for group in groups)


@functools.cache
def compiled(coefficient, variant, axes=None, **arguments):
    """Of a kernel: the gradient in closed form, and the penalty with its gradient by autodiff."""
    arguments |= {"variant": variant} | ({"view": {"kernel": axes}} if axes else {})
    ortho = optax_ortho(coefficient, **arguments)

    def update(kernel):
        params = {"kernel": kernel}
        zeros = {"kernel": jnp.zeros_like(kernel)}
        return ortho.update(zeros, ortho.init(params), params)[0]["kernel"]

    def penalty(kernel):
        return ortho_penalty({"kernel": kernel}, coefficient, **arguments)

    return jax.jit(update), jax.jit(jax.value_and_grad(penalty))


def closed_form(kernel, coefficient, variant, **arguments):
    return compiled(coefficient, variant, **arguments)[0](kernel)


def penalty_of(kernel, variant, **arguments):
    return compiled(2.0, variant, **arguments)[1](kernel)[0]


def draw(initializer, key, shape):
    return jax.jit(lambda key: initializer(key, shape))(key)


def relative(found, expected):
    scale = np.abs(np.asarray(expected)).max()
    return np.abs(np.asarray(found, np.float64) - np.asarray(expected)).max() / scale


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_is_that_of_the_float64_penalty(name, shape, record_property):
    values = np.random.default_rng(sum(shape)).normal(size=shape) / np.sqrt(np.prod(shape[:-1]))
    with jax.enable_x64(True):
        kernel = jnp.asarray(values)
        expected, gradient = jax.jit(jax.value_and_grad(lambda k: reference(name, k, 0.3)))(kernel)
        exact = closed_form(kernel, 0.3, name)
        penalty, through_autodiff = compiled(0.3, name)[1](kernel)
        assert exact.dtype == penalty.dtype == jnp.float64
    single = closed_form(jnp.asarray(values, jnp.float32), 0.3, name)
    errors = {
        "float64": relative(exact, gradient),
        "float32": relative(single, gradient),
        "penalty": relative(penalty, expected),
        "autodiff": relative(through_autodiff, gradient),
    }
    record_property("errors", {dtype: float(error) for dtype, error in errors.items()})
    # Power iteration is as good as the gap between the two largest eigenvalues.
    limit = 1e-6 if name == "srip" else 1e-13
    assert max(errors["float64"], errors["penalty"], errors["autodiff"]) < limit, errors
    assert errors["float32"] < 1e-5, errors


@pytest.mark.parametrize(
    ("shape", "stride"), [((5, 4, 2, 3), 2), ((2, 2, 1, 9), 3), ((4, 2, 7), 3)]
)
def test_strided_convolution(shape, stride):
    axes = dataclasses.replace(default_axes(len(shape)), strides=stride)
    with jax.enable_x64(True):
        kernel = jnp.asarray(np.random.default_rng(0).normal(size=shape) / 3)
        expected, gradient = jax.jit(jax.value_and_grad(lambda k: conv_reference(k, stride)))(
            kernel
        )
        found = closed_form(kernel, 2.0, "conv", axes=axes)
        penalty = penalty_of(kernel, "conv", axes=axes)
    assert relative(found, gradient) < 1e-13
    assert relative(penalty, expected) < 1e-13


def convolution_matrix(kernel, stride, side):
    """The convolution with circular padding as a matrix, column by column."""
    size = (side, side, kernel.shape[2])
    units = np.eye(math.prod(size), dtype=np.float32).reshape(-1, *size)
    border = (kernel.shape[0] - 1, kernel.shape[1] - 1)
    wrapped = np.pad(units, [(0, 0), (0, border[0]), (0, border[1]), (0, 0)], mode="wrap")
    outputs = jax.lax.conv_general_dilated(
        wrapped, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return np.asarray(outputs, np.float64).reshape(len(units), -1)


@pytest.mark.parametrize(("channels", "stride"), [((3, 2), 1), ((2, 3), 1), ((1, 3), 2)])
def test_conv_is_the_distance_of_the_operator_itself(channels, stride):
    """`P` = squared distance of the operator's smaller Gram matrix from I, per place."""
    kernel = jax.random.normal(jax.random.key(0), (3, 3, *channels)) / 3
    axes = KernelAxes((0, 1, 2), (3,), spatial=(0, 1), strides=stride)
    operator = convolution_matrix(np.asarray(kernel), stride, side=6)
    small = operator.T @ operator if channels[1] <= channels[0] * stride**2 else None
    if small is None:
        small = operator @ operator.T
    places = (6 // stride) ** 2
    distance = np.sum((small - np.eye(len(small))) ** 2) / places
    found = penalty_of(kernel, "conv", axes=axes)
    np.testing.assert_allclose(found, distance, rtol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_zero_gradient_at_the_minima(name):
    key = jax.random.key(1)
    for shape in [(2, 2, 4, 4), (2, 2, 2, 12)]:
        # The convolution is orthogonal with delta kernels, rows and columns with square ones.
        wide = shape[-1] > 8
        kernel = draw(
            delta_orthonormal(feature_groups=1) if name == "conv" else orthonormal(), key, shape
        )
        if name == "double" and wide:
            kernel = draw(orthonormal(), key, (12, 8)).T.reshape(shape)
        if name == "cosine":
            kernel = kernel * jnp.linspace(0.5, 2, shape[-1])
        assert np.abs(closed_form(kernel, 1.0, name)).max() < 2e-6
        penalty = float(penalty_of(kernel, name))
        floor = abs(math.prod(shape[:-1]) - shape[-1]) if name == "double" else 0
        np.testing.assert_allclose(penalty, floor, atol=1e-5)


def test_cosine_does_not_see_norms_and_has_no_pull_on_empty_columns():
    kernel = jax.random.normal(jax.random.key(5), (6, 4)).at[:, 2].set(0)
    scales = jnp.array([0.1, 3.0, 1.0, 40.0])
    gradient = closed_form(kernel, 1.0, "cosine")
    np.testing.assert_allclose(
        closed_form(kernel * scales, 1.0, "cosine"), gradient / scales, rtol=1e-4, atol=1e-7
    )
    assert not np.asarray(gradient[:, 2]).any() and np.isfinite(gradient).all()
    np.testing.assert_allclose(jnp.sum(kernel * gradient, axis=0), 0, atol=1e-6)


@pytest.mark.parametrize("variant", [MutualCoherence(squared=False), SRIP(squared=False)])
def test_the_papers_norms_without_the_square(variant):
    values = np.random.default_rng(1).normal(size=(9, 6)) / 3
    norm = {
        MutualCoherence: lambda w: jnp.max(jnp.abs(excess(w))),
        SRIP: lambda w: jnp.linalg.norm(excess(w), 2),
    }[type(variant)]
    with jax.enable_x64(True):
        kernel = jnp.asarray(values)
        expected = jax.grad(norm)(kernel)
        assert relative(closed_form(kernel, 2.0, variant), expected) < 1e-6
        penalty = penalty_of(kernel, variant)
        assert relative(penalty, norm(kernel)) < 1e-12
        assert np.isfinite(closed_form(jnp.eye(3), 2.0, variant)).all()


def test_srip_tells_the_sign_of_the_eigenvalue():
    """Eigenvalues of WᵀW − I of equal size and opposite sign, both orders."""
    for values in ([np.sqrt(1.5), np.sqrt(0.5001), 1.0], [np.sqrt(1.4999), np.sqrt(0.5), 1.0]):
        kernel = jnp.diag(jnp.array(values))
        gradient = np.asarray(closed_form(kernel, 1.0, "srip"))
        eigenvalues = np.array(values) ** 2 - 1
        worst = np.argmax(np.abs(eigenvalues))
        # A near-tie: the gradient is that of one of the two, never of a mixture.
        at = np.argmax(np.abs(np.diag(gradient)))
        expected = 2 * eigenvalues[at] * values[at]
        assert abs(eigenvalues[at]) > 0.999 * abs(eigenvalues[worst])
        np.testing.assert_allclose(gradient[at, at], expected, rtol=1e-3)


@pytest.mark.parametrize("grouping", ["ceil", "literal", "none"])
def test_groupings(grouping):
    values = np.random.default_rng(2).normal(size=(5, 13)) / 2
    with jax.enable_x64(True):
        kernel = jnp.asarray(values)
        ends = np.cumsum(group_sizes(5, 13, grouping))[:-1]
        expected, gradient = jax.jit(
            jax.value_and_grad(
                lambda k: sum(jnp.sum(excess(g) ** 2) for g in jnp.split(k, ends, axis=1))
            )
        )(kernel)
        found = closed_form(kernel, 2.0, "frobenius", grouping=grouping)
        assert relative(found, gradient) < 1e-13
        assert relative(penalty_of(kernel, "frobenius", grouping=grouping), expected) < 1e-13


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_kernels_stay_float32_where_float64_is_enabled(name):
    with jax.enable_x64(True):
        kernel = jnp.ones((2, 2, 2, 3), jnp.float32)
        shapes = jax.eval_shape(
            lambda k: (
                ortho_penalty({"kernel": k}, 0.1, variant=name),
                closed_form(k, 0.1, name),
                VARIANTS[name]().gradient(
                    k[None], jnp.eye(3, dtype=k.dtype)[None], Layout((2, 2, 2), 3, k.dtype)
                ),
            ),
            kernel,
        )
    assert [shape.dtype for shape in shapes] == [jnp.float32] * 3


def test_unknown_names_are_errors():
    with pytest.raises(ConfigError, match="frobenius"):
        optax_ortho(variant="frobenious")
    with pytest.raises(ConfigError, match="literal"):
        optax_ortho(grouping="litteral").init({"kernel": jnp.ones((2, 2))})
