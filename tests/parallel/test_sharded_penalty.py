"""The regularizer's work on eight devices: shared, and the same."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orthojax import optax_ortho
from orthojax.parallel import sharded_penalty
from orthojax.parallel.mesh import make_mesh, replicated
from orthojax.parallel.sharded_penalty import shard_penalty


@pytest.fixture
def mesh(monkeypatch):
    monkeypatch.setattr(sharded_penalty, "MIN_COLUMNS", 32)
    return make_mesh(data=8)


@pytest.fixture
def params():
    draw = functools.partial(jax.random.normal, dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(0), 5)
    return {
        "wide": {"kernel": draw(keys[0], (3, 3, 16, 48)) / 12, "bias": jnp.ones(48)},
        "scanned": {"kernel": draw(keys[1], (3, 3, 3, 32, 32)) / 16},
        "grouped": {"kernel": draw(keys[2], (1, 1, 24, 64)) / 5},  # columns in three groups
        "narrow": {"kernel": draw(keys[3], (3, 3, 16, 16)) / 12},
        "odd": {"kernel": draw(keys[4], (3, 3, 12, 32)) / 10},  # 8 does not divide 12
    }


def compiled_update(transformation, mesh, params):
    everywhere = replicated(mesh)
    step = jax.jit(
        lambda updates, params: transformation.update(updates, transformation.init(params), params)[
            0
        ],
        in_shardings=everywhere,
        out_shardings=everywhere,
    )
    return step.lower(params, params).compile()


def test_the_same_gradient_for_an_eighth_of_the_work(mesh, params):
    ortho = optax_ortho(0.1)
    alone, shared = (compiled_update(t, mesh, params) for t in (ortho, shard_penalty(ortho, mesh)))
    place = functools.partial(jax.device_put, device=replicated(mesh))
    updates = jax.tree.map(jnp.cos, params)
    found, expected = (program(place(updates), place(params)) for program in (shared, alone))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), found, expected)
    # What is narrow or odd is computed everywhere.
    flops = [program.cost_analysis()["flops"] for program in (shared, alone)]
    everywhere = sum(
        4 * p.size * p.shape[-1] for p in (params[k]["kernel"] for k in ("narrow", "odd"))
    )
    assert flops[0] < everywhere + (flops[1] - everywhere) / 4


def test_only_what_pays_is_shared(mesh):
    ortho = optax_ortho(0.1)
    assert shard_penalty(ortho, make_mesh(data=1)) is ortho
    assert shard_penalty(ortho, make_mesh(data=2, fsdp=4)) is ortho
    narrow = {"kernel": jnp.ones((3, 3, 16, 16))}
    text = compiled_update(shard_penalty(ortho, mesh), mesh, narrow).as_text()
    assert "all-gather" not in text and "all-reduce" not in text


def test_without_parameters_it_fails_as_the_transformation_does(mesh):
    ortho = shard_penalty(optax_ortho(0.1), mesh)
    params = {"kernel": jnp.ones((16, 32))}
    with pytest.raises(ValueError, match="params"):
        ortho.update(params, ortho.init(params))
    assert isinstance(optax.chain(ortho, optax.sgd(0.1)), optax.GradientTransformation)
