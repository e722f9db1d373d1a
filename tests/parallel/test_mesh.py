"""One program on meshes of 1 and 8 devices: the same numbers, each array where it should lie."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from orthojax.analysis.cost import all_reduces
from orthojax.configs import digits_plain110
from orthojax.errors import ConfigError
from orthojax.parallel.mesh import (
    AXES,
    FSDP_MIN_SIZE,
    batch_sharding,
    local_rows,
    make_mesh,
    state_shardings,
    to_devices,
)
from orthojax.training.compiled import abstract_state, compile_steps, lower_train_step
from orthojax.training.experiment import build

STEPS = 4


def experiment(mesh, **model):
    config = digits_plain110.get_config("depth=8,steps=30")
    config.batch_size, config.schedule.warmup_steps = 32, 0
    config.model.update({"width": 8, **model})
    config.mesh = mesh
    return build(config)


def train(mesh, **model):
    """The first state, and states and losses of a few steps."""
    built = experiment(mesh, **model)
    programs = compile_steps(built)
    batches = built.dataset.train_batches(32, 0)
    states, losses = [programs.init()], []
    first = jax.device_get(states[0])
    for _ in range(STEPS):
        state, metrics = programs.train_step(states[-1], programs.put(next(batches)))
        states.append(state)
        losses.append(float(metrics["loss"]))
    return first, states[-1], losses, programs


@pytest.fixture(scope="module")
def single():
    return train({"data": 1, "fsdp": 1})


@pytest.mark.parametrize("shape", [(8, 1), (2, 4), (1, 8)])
def test_losses_do_not_depend_on_the_mesh(shape, single):
    mesh = dict(zip(AXES, shape, strict=True))
    first, last, losses, programs = train(mesh)
    # The initialization is the same function of the seed, however it is spread.
    chex.assert_trees_all_close(first, single[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(losses, single[2], rtol=2e-5)
    chex.assert_trees_all_close(last, single[1], rtol=2e-3, atol=2e-5)
    # Updating leaves everything where it was put.
    wanted = jax.tree.map(lambda leaf: leaf.sharding, programs.abstract_state)
    found = jax.tree.map(lambda leaf: leaf.sharding, last)
    same = jax.tree.map(lambda leaf, a, b: a.is_equivalent_to(b, leaf.ndim), last, found, wanted)
    assert all(jax.tree.leaves(same))
    if mesh["fsdp"] > 1:
        kernel = last.params["stage_3"]["entry"]["layer_1"]["conv"]["kernel"]
        assert kernel.size >= FSDP_MIN_SIZE
        assert kernel.addressable_shards[0].data.size * mesh["fsdp"] == kernel.size


@pytest.mark.parametrize("scan", [True, False])
def test_large_kernels_and_their_momentum_are_split_and_nothing_else(scan):
    state = abstract_state(experiment({"data": 2, "fsdp": 4}, width=16, scan=scan))
    parts = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        parts[name] = leaf.sharding.shard_shape(leaf.shape), leaf
    for name, (shard, leaf) in parts.items():
        large = name.endswith("kernel") and leaf.size >= FSDP_MIN_SIZE
        assert np.prod(shard) * (4 if large else 1) == leaf.size, name
        if leaf.ndim == 5:
            assert shard[0] == leaf.shape[0], name  # layers stay together
    split = {name for name, (shard, leaf) in parts.items() if shard != leaf.shape}
    momentum = {name for name in split if name.startswith("opt_state")}
    assert len(split) == 2 * len(momentum) > 0


def test_split_kernels_are_gathered_and_activations_stay_where_they_are():
    text = lower_train_step(experiment({"data": 2, "fsdp": 4})).compile().as_text()
    names = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = set(re.findall(rf" = .*? ({names})(?:-start)?\(", text))
    assert "all-gather" in found
    assert not found & {"all-to-all", "collective-permute"}


def test_kernels_that_fsdp_does_not_divide_are_left_whole():
    mesh = make_mesh(data=1, fsdp=8)
    tree = {"a": {"kernel": jnp.zeros((3, 3, 12, 20))}, "b": {"kernel": jnp.zeros((9, 64, 12))}}
    specs = jax.tree.map(lambda s: tuple(s.spec), state_shardings(tree, mesh))
    assert specs == {"a": {"kernel": ()}, "b": {"kernel": (None, "fsdp", None)}}


def test_meshes_that_cannot_be_are_refused():
    for arguments, message in (
        ({"fsdp": 3}, "fsdp=3 does not divide the 8 devices"),
        ({"data": 3, "fsdp": 4}, "need 12 devices"),
        ({"data": 0}, "need 0 devices"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_mesh(**arguments)
    with pytest.raises(ConfigError, match="batch_size=12 cannot be split over 8"):
        batch_sharding(make_mesh(), 12)


def test_one_process_supplies_all_rows():
    for batch_size in (8, 24):
        rows = local_rows(batch_sharding(make_mesh(data=2, fsdp=4), batch_size), batch_size)
        np.testing.assert_array_equal(rows, np.arange(batch_size))


def test_rows_reach_their_devices_in_whatever_order_these_lie(monkeypatch):
    """As in a run of several processes, whose meshes follow the interconnect."""
    devices = np.random.default_rng(0).permutation(np.asarray(jax.devices())).reshape(2, 4)
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 2)
    sharding = batch_sharding(mesh, 32)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    batch = {"image": np.arange(96).reshape(32, 3), "label": np.arange(32)}
    placed = to_devices(sharding, 32, local_rows(sharding, 32), batch)
    for name, array in placed.items():
        assert array.sharding == sharding
        np.testing.assert_array_equal(array, batch[name])


# --- batch normalization in groups ---------------------------------------------------------------


def test_groups_have_to_divide_the_batch():
    with pytest.raises(ConfigError, match=r"model.bn_groups`=5 does not divide batch_size=32"):
        experiment({"data": 1, "fsdp": 1}, bn_groups=5)


def test_batch_norm_in_as_many_groups_as_devices_needs_no_communication():
    def count(groups):
        lowered = lower_train_step(experiment({"data": 8, "fsdp": 1}, bn_groups=groups))
        return all_reduces(lowered.compile())

    synchronized, apart = count(1), count(8)
    # Every layer reduces its statistics, and in the backward pass what comes back to them.
    assert synchronized - apart >= 7 * 2, (synchronized, apart)
    # And the result is the same wherever the groups lie.
    eight, one = (train({"data": n, "fsdp": 1}, bn_groups=8)[2] for n in (8, 1))
    np.testing.assert_allclose(eight, one, rtol=2e-5)


def test_batches_lie_split_over_both_axes():
    mesh = make_mesh(data=2, fsdp=4)
    assert isinstance(batch_sharding(mesh, 32), NamedSharding)
    assert batch_sharding(mesh, 32).spec == PartitionSpec(AXES)
    assert batch_sharding(mesh, 32).shard_shape((32, 8, 8, 1)) == (4, 8, 8, 1)
