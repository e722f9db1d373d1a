"""One program on meshes of 1 and 8 devices: the same numbers, each array where it should lie."""

import dataclasses
import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from orthojax.benchmarks.cost import all_reduces
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
from orthojax.training.compiled import (
    CompiledSteps,
    abstract_state,
    compile_steps,
    lower_train_step,
)
from orthojax.training.experiment import build
from tests.models.small_nets import SmallPlainNet

STEPS = 3


def experiment(mesh, **model):
    """The digits' config, with a net that has fewer layers to compile."""
    config = digits_plain110.get_config("depth=8,steps=30")
    config.batch_size, config.schedule.warmup_steps = 32, 0
    config.model.update({"width": 8, **model})
    config.mesh = mesh
    built = build(config)
    names = ("width", "kernel_init", "bn_bias", "bn_groups", "modulated", "scan")
    net = SmallPlainNet(**{name: getattr(built.net, name) for name in names})
    return dataclasses.replace(built, net=net)


def take_steps(built, step, state):
    """The state after a few steps from a copy of `state`, where the mesh wants it, and losses."""
    wanted = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(built))
    state, losses = jax.device_put(state, wanted), []
    batches = built.dataset.train_batches(32, 0)
    place = batch_sharding(built.mesh, 32)
    for _ in range(STEPS):
        batch = to_devices(place, 32, np.arange(32), next(batches))
        state, metrics = step(state, batch, built.hyperparams)
        losses.append(float(metrics["loss"]))
    return state, losses


class Trained(NamedTuple):
    """The first state, the one after a few steps, their losses, and what computed them."""

    first: Any
    last: Any
    losses: list[float]
    programs: CompiledSteps


def train(mesh):
    built = experiment(mesh)
    programs = compile_steps(built)
    first = jax.device_get(programs.init())
    return Trained(first, *take_steps(built, programs.compiled_train_step, first), programs)


@pytest.fixture(scope="module")
def single():
    return train({"data": 1, "fsdp": 1})


@pytest.fixture(scope="module")
def split():
    return train({"data": 2, "fsdp": 4})


def test_losses_do_not_depend_on_the_mesh(single, split):
    # The initialization is the same function of the seed, however it is spread.
    chex.assert_trees_all_close(split.first, single.first, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(split.losses, single.losses, rtol=2e-5)
    chex.assert_trees_all_close(split.last, single.last, rtol=2e-3, atol=2e-5)


def test_updating_leaves_everything_where_it_was_put(split):
    def in_place(leaf, wanted):
        return leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)

    assert all(jax.tree.leaves(jax.tree.map(in_place, split.last, split.programs.abstract_state)))
    kernel = split.last.params["stage_2"]["entry"]["layer_1"]["conv"]["kernel"]
    assert kernel.size >= FSDP_MIN_SIZE
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size


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


def test_split_kernels_are_gathered_and_activations_stay_where_they_are(split):
    text = split.programs.compiled_train_step.as_text()
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


def test_batches_lie_split_over_both_axes():
    mesh = make_mesh(data=2, fsdp=4)
    assert isinstance(batch_sharding(mesh, 32), NamedSharding)
    assert batch_sharding(mesh, 32).spec == PartitionSpec(AXES)
    assert batch_sharding(mesh, 32).shard_shape((32, 8, 8, 1)) == (4, 8, 8, 1)


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


def test_batch_norm_in_as_many_groups_as_devices_needs_no_communication(single):
    losses = {}
    for devices in (8, 1):
        built = experiment({"data": devices, "fsdp": 1}, bn_groups=8)
        step = lower_train_step(built, abstract_state(built)).compile()
        if devices == 8:  # of gradients and metrics; each of five layers would have two more
            assert 0 < all_reduces(step) < 5
        losses[devices] = take_steps(built, step, single.first)[1]
    # And the result is the same wherever the groups lie.
    np.testing.assert_allclose(losses[8], losses[1], rtol=2e-5)
    assert not np.allclose(losses[8], single.losses, rtol=1e-3)
