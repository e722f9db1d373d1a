"""The error of a kernel, and the nearest orthonormal one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthojax.errors import ConfigError
from orthojax.initializers import orthonormal
from orthojax.ortho import (
    mean_correlation,
    ortho_penalty,
    orthonormality_error,
    project_orthonormal,
)

METHODS = pytest.mark.parametrize("method", ["newton_schulz", "svd"])


def draw(initializer, shape):
    return jax.jit(lambda key: initializer(key, shape))(jax.random.key(1))


@functools.partial(jax.jit, static_argnames="method")
def projected(kernel, method):
    return project_orthonormal({"kernel": kernel}, method=method)["kernel"]


def test_error_is_the_worst_group_of_the_worst_layer():
    kernel = jax.random.normal(jax.random.key(0), (2, 3, 10))
    found = orthonormality_error({"scanned": {"kernel": kernel, "bias": jnp.ones((2, 10))}})
    errors = []
    for layer in np.asarray(kernel, np.float64):
        for group in np.split(layer, [3, 6, 9], axis=1):
            size = group.shape[1]
            errors.append(np.linalg.norm(group.T @ group - np.eye(size)) / np.sqrt(size))
    assert list(found) == ["scanned/kernel"]
    np.testing.assert_allclose(found["scanned/kernel"], max(errors), rtol=1e-5)


def test_initial_kernels_have_no_error_and_no_penalty():
    params = {"kernel": draw(orthonormal(), (3, 3, 3, 64))}
    assert jax.jit(orthonormality_error)(params)["kernel"] < 1e-6
    assert jax.jit(ortho_penalty)(params) < 1e-10


def test_a_tree_without_kernels():
    params = {"bias": jnp.ones(3)}
    assert orthonormality_error(params) == {}
    for function in (ortho_penalty, project_orthonormal):
        with pytest.raises(ConfigError, match="nothing to penalize.*'bias' .named bias"):
            function(params)
    # What optax may leave of a tree, and a layer of width 0.
    for params in ({"bias": None}, {}, {"kernel": jnp.zeros((0, 4))}):
        assert orthonormality_error(params) == {}
        assert ortho_penalty(params) == 0
        assert project_orthonormal(params) == params or "kernel" in params


def polar(matrix):
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    return left @ right


@METHODS
@pytest.mark.parametrize("grouping", ["ceil", "none"])
def test_projection_is_the_polar_factor(method, grouping):
    draw = np.random.default_rng(2).normal
    params = {
        "tall": {"kernel": draw(size=(3, 3, 4, 8))},
        "wide": {"kernel": draw(size=(4, 10))},
        "norm": {"scale": np.ones(4)},
    }
    single = jax.tree.map(jnp.float32, params)
    found = jax.jit(lambda p: project_orthonormal(p, grouping=grouping, method=method))(single)
    np.testing.assert_allclose(
        found["tall"]["kernel"].reshape(36, 8),
        polar(params["tall"]["kernel"].reshape(36, 8)),
        atol=2e-6,
    )
    ends = [4, 8] if grouping == "ceil" else []
    groups = np.split(params["wide"]["kernel"], ends, axis=1)
    expected = np.concatenate([polar(group) for group in groups], axis=1)
    np.testing.assert_allclose(found["wide"]["kernel"], expected, atol=5e-5)
    np.testing.assert_array_equal(found["norm"]["scale"], 1)
    if grouping == "ceil":
        assert max(orthonormality_error(found).values()) < 2e-6


def test_projection_of_an_orthonormal_kernel_is_itself_and_keeps_dtypes():
    kernel = draw(orthonormal(), (3, 3, 4, 8))
    found = projected(kernel, "newton_schulz")
    np.testing.assert_allclose(found, kernel, atol=1e-6)
    low = projected(3 * kernel.astype(jnp.bfloat16), "newton_schulz")
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), kernel, atol=1e-2)


@METHODS
def test_projection_of_ill_conditioned_kernels(method):
    """Singular values from 1 to 1e-3, in float64 to see the method and not the conditioning."""
    rng = np.random.default_rng(4)
    left, right = (np.linalg.qr(rng.normal(size=shape))[0] for shape in ((12, 6), (6, 6)))
    with jax.enable_x64(True):
        kernel = jnp.asarray((left * np.logspace(0, -3, 6)) @ right.T)
        found = projected(kernel, method)
    np.testing.assert_allclose(found, left @ right.T, atol=1e-11)


@METHODS
@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1.0, 1e20, 1e30])
def test_projection_does_not_depend_on_the_scale(method, scale):
    matrix = np.random.default_rng(5).normal(size=(16, 8))
    found = projected(jnp.asarray(scale * matrix, jnp.float32), method)
    np.testing.assert_allclose(found, polar(matrix), atol=2e-6)


@METHODS
@pytest.mark.parametrize("smallest", [1e-5, 1e-7, 0.0])
def test_projection_converges_whatever_the_condition(method, smallest):
    rng = np.random.default_rng(6)
    left, right = (np.linalg.qr(rng.normal(size=(64, 64)))[0] for _ in range(2))
    values = np.ones(64)
    values[-3:] = smallest
    kernel = jnp.asarray(left * values @ right.T, jnp.float32)
    found = projected(kernel, method)
    assert orthonormality_error({"kernel": found})["kernel"] < 1e-5
    # Where the kernel says what is nearest, that is it.
    np.testing.assert_allclose(left[:, :61].T @ found @ right[:, :61], np.eye(61), atol=1e-4)


@METHODS
@pytest.mark.parametrize(
    "kernel",
    {
        "zero": np.zeros((6, 4)),
        "a dead column": np.eye(6, 4) * [1, 0, 1, 1],
        "equal columns": np.ones((6, 4)),
        "zero, in groups": np.zeros((4, 10)),
        "equal columns, in groups": np.ones((4, 10)),
        "one element": np.zeros((1, 1)),
    }.items(),
    ids=lambda item: item[0],
)
def test_projection_without_full_rank_picks_an_orthonormal_one(method, kernel):
    found = projected(jnp.asarray(kernel[1], jnp.float32), method)
    assert orthonormality_error({"kernel": found})["kernel"] < 1e-5


def test_projection_of_what_is_not_finite_is_not_finite_and_leaves_the_others_alone():
    good = jax.random.normal(jax.random.key(7), (8, 4))
    params = {"bad": {"kernel": good.at[0, 0].set(jnp.nan)}, "good": {"kernel": good}}
    found = project_orthonormal(params)
    assert np.isnan(found["bad"]["kernel"]).any()
    assert orthonormality_error(found)["good/kernel"] < 1e-6


def test_unknown_method():
    with pytest.raises(ConfigError, match="newton_schulz"):
        project_orthonormal({"kernel": jnp.eye(2)}, method="qr")


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("absolute", [True, False])
def test_mean_correlation_is_equation_8(diagonal, absolute):
    draw = np.random.default_rng(3).normal
    params = {
        "first": {"kernel": draw(size=(3, 3, 1, 12))},  # more columns than rows
        "scanned": {"kernel": draw(size=(2, 3, 3, 4, 6)), "bias": np.ones((2, 6))},
        "head": {"kernel": draw(size=(6, 5))},
    }
    matrices = [
        params["first"]["kernel"].reshape(9, 12),
        *(layer.reshape(36, 6) for layer in params["scanned"]["kernel"]),
        params["head"]["kernel"],
    ]
    total = count = 0
    for matrix in matrices:
        columns = matrix.T
        for i in range(len(columns)):
            for j in range(i if diagonal else i + 1, len(columns)):
                lengths = np.linalg.norm(columns[i]) * np.linalg.norm(columns[j])
                cosine = columns[i] @ columns[j] / lengths
                total += abs(cosine) if absolute else cosine
                count += 1
    single = jax.tree.map(jnp.float32, params)
    found = jax.jit(lambda p: mean_correlation(p, diagonal=diagonal, absolute=absolute))(single)
    np.testing.assert_allclose(found, total / count, rtol=1e-4, atol=1e-7)


def test_correlation_of_orthonormal_kernels_as_printed_is_that_of_the_diagonal():
    params = {"kernel": draw(orthonormal(), (3, 3, 8, 20))}
    np.testing.assert_allclose(mean_correlation(params), 2 / 21, rtol=1e-4)
    assert abs(mean_correlation(params, diagonal=False)) < 1e-7


def test_nothing_to_correlate_is_refused_and_a_dead_column_is_not():
    with pytest.raises(ConfigError, match="no two columns"):
        mean_correlation({"kernel": jnp.ones((3, 1))}, diagonal=False)
    dead = {"kernel": jnp.zeros((3, 2)).at[:, 0].set(1)}
    np.testing.assert_allclose(mean_correlation(dead), 1 / 3)
