"""Costs of compiled programs against costs by hand, and the count of all-reduces."""

import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from orthojax.benchmarks.cost import all_reduces, measure, tpu_devices
from orthojax.errors import MissingExtraError


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))


def array(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def cost_of(function, *arguments, **options):
    return measure(jax.jit(function, **options).lower(*arguments))


def test_a_matrix_product():
    cost = cost_of(jnp.matmul, array(64, 32), array(32, 16))
    assert cost.flops == 2 * 64 * 32 * 16
    assert cost.bytes_accessed == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert cost.bytes_accessed <= cost.memory < 2 * cost.bytes_accessed
    assert cost.all_reduces == 0


def test_donated_memory_counts_once():
    kept, donated = (
        cost_of(lambda x: x + 1, array(1000, 1000), donate_argnums=donate).memory
        for donate in ((), 0)
    )
    assert kept - donated == pytest.approx(4e6, rel=0.01)


def test_the_partitioners_all_reduce(mesh):
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), ()))
    cost = cost_of(lambda x: x.T @ x, array(64, 16), in_shardings=split, out_shardings=whole)
    assert cost.all_reduces == 1
    # A device's share, and the reduction.
    assert cost.flops == pytest.approx(2 * 8 * 16 * 16 + 16 * 16, rel=1e-4)


@pytest.mark.parametrize(
    ("expected", "function"),
    [
        (0, lambda x: jax.lax.all_gather(x, "data")),
        (1, lambda x: jax.lax.psum(x, "data")),
        (2, lambda x: jax.lax.psum(jnp.sin(jax.lax.psum(x, "data")), "data")),
        (1, lambda x: jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(jax.lax.psum(x, "data")), x)),
    ],
    ids=["gather", "one", "one after the other", "in a loop"],
)
def test_all_reduces_of_a_program(mesh, expected, function):
    axes = PartitionSpec("data")
    mapped = jax.shard_map(function, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)
    assert all_reduces(jax.jit(mapped).lower(array(8 * 16, 32)).compile()) == expected


def test_asynchronous_all_reduces_count_once():
    """As accelerators have them."""
    text = """
  %a = f32[8]{0} all-reduce-start(%x), channel_id=1, replica_groups={}, to_apply=%sum
  %b = f32[8]{0} all-reduce-done(%a)
  %c = f32[8]{0} all-reduce(%y), channel_id=2, replica_groups={}, to_apply=%sum
  %d = f32[8]{0} fusion(%all-reduce.7), kind=kLoop, calls=%all-reduce-fusion
"""
    assert all_reduces(types.SimpleNamespace(as_text=lambda: text)) == 2


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"needs libtpu: pip install .*\[tpu\]"):
        tpu_devices("v5e:4x4")
