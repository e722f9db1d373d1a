"""Adam with one second moment for each matrix."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orthojax import scale_by_matrix_adam
from orthojax.errors import ConfigError

SHAPES = {
    "tall": {"kernel": (7, 3), "bias": (3,)},
    "wide": {"kernel": (3, 8)},  # groups of 3, 3 and 2 columns
    "scanned": {"conv": {"kernel": (2, 3, 3, 2, 4), "bias": (2, 4)}},
}


def random_tree(seed, dtype=jnp.float32):
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(
        lambda shape: jnp.asarray(draw(size=shape), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def run(tx, gradients, params):
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
    return updates, state


def reference(gradients, columns, b1=0.9, b2=0.999, eps=1e-8):
    """Of one matrix, in float64."""
    mu, nu = 0.0, 0.0
    count = len(gradients)
    for gradient in np.asarray(gradients, np.float64):
        mu = b1 * mu + (1 - b1) * gradient
        nu = b2 * nu + (1 - b2) * np.sum(gradient**2) / columns
    return mu / (1 - b1**count) / (np.sqrt(nu / (1 - b2**count)) + eps)


def test_every_block_is_that_of_the_reference_and_the_rest_is_adam():
    gradients = [random_tree(seed) for seed in (1, 2, 3)]
    updates, state = run(scale_by_matrix_adam(), gradients, random_tree(0))
    shapes = {path: nu.shape for path, nu in state.nu.items() if path.endswith("kernel")}
    assert shapes == {"tall/kernel": (1,), "wide/kernel": (3,), "scanned/conv/kernel": (2,)}
    pieces = {
        "tall": lambda tree: [tree["tall"]["kernel"]],
        "wide": lambda tree: np.split(tree["wide"]["kernel"], (3, 6), axis=1),
        "scanned": lambda tree: list(tree["scanned"]["conv"]["kernel"]),
    }
    for split in pieces.values():
        for found, *history in zip(split(updates), *map(split, gradients), strict=True):
            np.testing.assert_allclose(found, reference(history, found.shape[-1]), rtol=1e-5)
    expected, _ = run(optax.scale_by_adam(), gradients, random_tree(0))
    for name in ("tall", "scanned"):
        pair = [tree[name].get("conv", tree[name])["bias"] for tree in (updates, expected)]
        np.testing.assert_allclose(*pair, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes(dtype):
    updates, state = run(scale_by_matrix_adam(), [random_tree(1, dtype)], random_tree(0, dtype))
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
    assert {nu.dtype for nu in state.nu.values()} == {jnp.dtype(jnp.float32)}
    # The first step of Adam has size one: the mean norm of a column here.
    np.testing.assert_allclose(
        jnp.linalg.norm(updates["tall"]["kernel"].astype(jnp.float32)), 3**0.5, rtol=1e-2
    )


def test_masked_kernels_get_adam_and_absent_ones_are_passed_over():
    params = {"a": {"kernel": jnp.eye(3)}, "b": {"kernel": jnp.eye(2)}, "c": optax.MaskedNode()}
    gradient = jax.tree.map(lambda x: x + 0.5, params)
    mask = {"a": True, "b": False}
    tx = scale_by_matrix_adam(mask=mask)
    updates, _ = run(tx, [gradient], params)
    np.testing.assert_allclose(updates["b"]["kernel"], 1, rtol=1e-5)
    assert float(jnp.ptp(updates["a"]["kernel"])) > 0.1
    chex.assert_trees_all_equal_structs(updates, params)


def test_bad_arguments():
    with pytest.raises(ConfigError, match="none of these parameters is a kernel"):
        scale_by_matrix_adam().init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match="not passing `params`"):
        tx = scale_by_matrix_adam()
        tx.update({"kernel": jnp.eye(2)}, tx.init({"kernel": jnp.eye(2)}))


def test_it_does_not_depend_on_the_basis():
    rng = np.random.default_rng(4)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (6, 4))
    gradients = [{"kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)} for _ in range(3)]
    turned = [{"kernel": left @ g["kernel"] @ right} for g in gradients]
    params = {"kernel": jnp.zeros((6, 4))}
    plain, _ = run(scale_by_matrix_adam(), gradients, params)
    after, _ = run(scale_by_matrix_adam(), turned, params)
    np.testing.assert_allclose(after["kernel"], left @ plain["kernel"] @ right, atol=1e-5)


def test_optax_maps_over_the_moments_of_the_parameters():
    """Second moments of kernels have no parameter's shape, and stay as they are."""
    tx, params = scale_by_matrix_adam(), {"kernel": jnp.eye(2), "bias": jnp.ones(2)}
    state = tx.init(params)
    mapped = optax.tree_map_params(tx, lambda moment, by: moment + by, state, params)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert jax.tree.map(np.array_equal, mapped.mu, params) == {"kernel": True, "bias": True}
    np.testing.assert_array_equal(mapped.nu["kernel"], [0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_injected_numbers_leave_dtypes_as_they_are(dtype):
    params = {"kernel": jnp.eye(2, dtype=dtype), "bias": jnp.ones(2, dtype)}
    tx = optax.inject_hyperparams(scale_by_matrix_adam, hyperparam_dtype=jnp.float32)()
    state = tx.init(params)
    updates, after = tx.update(params, state, params)
    dtypes = [jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (state, after)]
    assert dtypes[0] == dtypes[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
