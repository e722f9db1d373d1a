"""On a mesh of 8 devices: updates are sharded as the parameters are, and have the same values."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from orthojax.ortho import (
    optax_ortho,
    orthonormality_error,
    project_orthonormal,
    scale_by_soap,
)

# Kernels of one shape that are sharded alike, a stack, a first layer with groups, a dense head.
SHAPES = {
    "a/kernel": (3, 3, 8, 16),
    "b/kernel": (3, 3, 8, 16),
    "scanned/kernel": (2, 3, 3, 8, 16),
    "stem/kernel": (1, 1, 4, 16),
    "head/kernel": (16, 8),
    "head/bias": (8,),
}
LAYOUTS = {
    "data": {},
    "fsdp over inputs": {
        "a/kernel": P(None, None, "model"),
        "b/kernel": P(None, None, "model"),
        "scanned/kernel": P(None, None, None, "model"),
        "stem/kernel": P(None, None, "model"),
        "head/kernel": P("model"),
    },
    "tensor parallel over outputs": {
        "a/kernel": P(None, None, None, "model"),
        "b/kernel": P(None, None, None, "model"),
        "scanned/kernel": P(None, None, None, None, "model"),
        "stem/kernel": P(None, None, None, "model"),
        "head/kernel": P(None, "model"),
        "head/bias": P("model"),
    },
    "both ways": {
        "a/kernel": P(None, None, "data", "model"),
        "b/kernel": P(None, None, "model", "data"),
        "scanned/kernel": P("data", None, None, None, "model"),
        "head/kernel": P("data", "model"),
    },
}


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        module, name = path.split("/")
        tree.setdefault(module, {})[name] = leaf
    return tree


def sharded_params(layout, axis_type=AxisType.Auto):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(0)
    values = {path: rng.normal(size=shape).astype("f4") / 4 for path, shape in SHAPES.items()}
    shardings = {path: NamedSharding(mesh, LAYOUTS[layout].get(path, P())) for path in SHAPES}
    placed = {path: jax.device_put(values[path], shardings[path]) for path in SHAPES}
    return nested(values), nested(placed), nested(shardings)


def compiled_update():
    ortho = optax_ortho(0.1)
    return jax.jit(lambda updates, params: ortho.update(updates, ortho.init(params), params)[0])


@functools.cache
def expected_update():
    values, _, _ = sharded_params("data")
    return compiled_update()(jax.tree.map(np.zeros_like, values), values)


def check(layout, axis_type=AxisType.Auto):
    _, params, shardings = sharded_params(layout, axis_type)
    # No out_shardings: what the compiler propagates by itself.
    updates = compiled_update()(jax.tree.map(jnp.zeros_like, params), params)
    for found, exact, sharding in zip(
        *map(jax.tree.leaves, (updates, expected_update(), shardings)), strict=True
    ):
        assert found.sharding.is_equivalent_to(sharding, found.ndim)
        np.testing.assert_allclose(found, exact, atol=2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_have_the_sharding_and_the_values(layout):
    check(layout)


@pytest.mark.parametrize("layout", ["fsdp over inputs", "both ways"])
def test_meshes_with_explicit_axes(layout):
    check(layout, AxisType.Explicit)
    _, params, _ = sharded_params(layout, AxisType.Explicit)

    @jax.jit
    def project(params):
        after = project_orthonormal(params)
        return after, orthonormality_error(after)

    after, errors = project(params)
    assert max(errors.values()) < 1e-5
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, params)


def collectives(layout):
    _, params, _ = sharded_params(layout)
    return collectives_of(compiled_update().lower(params, params).compile())


def collectives_of(compiled):
    names = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf" = .*? ({names})(?:-start)?\(", compiled.as_text())


def test_data_parallel_needs_no_collectives():
    assert not collectives("data")


def test_kernels_sharded_over_inputs_are_never_gathered():
    """What crosses devices is the Gram matrices, summed, in one reduction."""
    assert collectives("fsdp over inputs") == ["all-reduce"]


def preconditioned(layout, axis_type):
    """Parameters, the second update by `scale_by_soap`, its state, and what crosses devices."""
    _, params, _ = sharded_params(layout, axis_type)
    with jax.enable_x64(True):
        params = {"scanned": jax.tree.map(jnp.float64, params["scanned"])}
        tx = scale_by_soap(refresh_every=1)

        @jax.jit
        def update(scale, state, params):
            return tx.update(jax.tree.map(lambda p: scale * p, params), state, params)

        state = jax.jit(tx.init)(params)
        for scale in (1.0, 2.0):
            updates, state = update(scale, state, params)
        crossing = collectives_of(update.lower(2.0, state, params).compile())
    return params, updates, state, crossing


def test_preconditioned_updates_have_the_values_and_the_sharding():
    _, expected, _, crossing = preconditioned("data", AxisType.Auto)
    assert not crossing
    params, updates, state, _ = preconditioned("both ways", AxisType.Explicit)
    chex.assert_trees_all_close(updates, expected, atol=1e-5)
    types = [jax.tree.map(jax.typeof, tree) for tree in (params, updates, state.mu, state.nu)]
    assert types[0] == types[1] == types[2] == types[3]
