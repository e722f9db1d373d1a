"""Figures of compiled programs against figures by hand, and the table of TPU slices."""

import functools
import math
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from orthojax.analysis.cost import Collective, Cost, estimate, measure, table
from orthojax.analysis.hlo import parse, shape_bytes
from orthojax.analysis.memory_traffic import array_bytes, memory_traffic
from orthojax.errors import ConfigError
from orthojax.topology import CHIPS, TOPOLOGIES, find_topology

EIGHT = 8


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto, AxisType.Auto))


def array(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


def cost_of(function, *arguments, **options):
    return measure(jax.jit(function, **options).lower(*arguments))


def close(value):
    """Within what the counters of loops and the like add."""
    return pytest.approx(value, rel=1e-4)


def repeated_product(x, kernels):
    return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, kernels)[0]


# Flops and bytes


def test_a_matrix_product():
    cost = cost_of(jnp.matmul, array(64, 32), array(32, 16))
    assert cost.flops == cost.flops_loops_once == 2 * 64 * 32 * 16
    assert cost.bytes_accessed == cost.hbm_traffic_bytes == 4 * (64 * 32 + 32 * 16 + 64 * 16)
    assert cost.hbm_peak_bytes >= cost.bytes_accessed
    assert (cost.collectives, cost.cycles, cost.unknown_loops) == ({}, None, 0)


def test_a_convolution():
    """Of a 3×3 window over 8×8 pixels with padding, (3·8 − 2)² of the 9·64 products are real."""
    convolve = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    cost = cost_of(convolve, array(4, 8, 8, 16), array(3, 3, 16, 32))
    assert cost.flops == 2 * 4 * (3 * 8 - 2) ** 2 * 16 * 32


@pytest.mark.parametrize("turns", [2, 7])
def test_a_loop_counts_as_often_as_it_turns(turns):
    cost = cost_of(repeated_product, array(64, 32), array(turns, 32, 32))
    assert cost.flops == close(turns * 2 * 64 * 32 * 32)
    assert cost.flops_loops_once == close(2 * 64 * 32 * 32)
    one = 4 * (2 * 64 * 32 + 32 * 32)
    # More than the products: each turn's kernel is taken out of the stack, and the result copied.
    assert turns * one < cost.bytes_accessed < turns * 3 * one
    assert cost.unknown_loops == 0


def test_loops_in_loops_multiply():
    def nested(x, kernels):
        return jax.lax.scan(lambda x, _: (repeated_product(x, kernels), None), x, None, length=3)[0]

    cost = cost_of(nested, array(64, 32), array(4, 32, 32))
    assert cost.flops == close(3 * 4 * 2 * 64 * 32 * 32)


def test_a_loop_without_a_known_end_is_reported():
    def until_small(x, kernel):
        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1, lambda x: x @ kernel, x)

    cost = cost_of(until_small, array(64, 32), array(32, 32))
    assert cost.unknown_loops == 1
    assert cost.flops == cost.flops_loops_once


@pytest.mark.parametrize(
    "function",
    [
        lambda x: jnp.tanh(x) + 1,
        lambda x: x @ x.T,
        lambda x: jax.lax.dynamic_slice(x, (3, 0), (8, 64)),
        lambda x: jnp.sum(x * x),
    ],
)
def test_without_on_chip_memory_the_traffic_is_what_xla_says(function):
    compiled = jax.jit(function).lower(array(64, 64)).compile()
    expected = compiled.cost_analysis()["bytes accessed"]
    assert memory_traffic(parse(compiled.as_text())) == pytest.approx(expected, rel=0.01, abs=16)


# Collectives


def shard(mesh, function):
    axes = PartitionSpec(("a", "b"))
    return jax.shard_map(function, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)


PAYLOAD = 4 * 16 * 32  # of every device: float32 (16, 32)


@pytest.mark.parametrize(
    ("kind", "payload", "sent", "function"),
    [
        ("all-reduce", PAYLOAD, 2 * 7 / 8, lambda x: jax.lax.psum(x, ("a", "b"))),
        ("all-reduce", PAYLOAD, 2 * 3 / 4, lambda x: jax.lax.psum(x, "b")),
        ("all-gather", EIGHT * PAYLOAD, 7 / 8, lambda x: jax.lax.all_gather(x, ("a", "b"))),
        ("reduce-scatter", PAYLOAD, 1 / 2, lambda x: jax.lax.psum_scatter(x, "a", tiled=True)),
        ("all-to-all", PAYLOAD, 3 / 4, lambda x: jax.lax.all_to_all(x, "b", 0, 0, tiled=True)),
        ("collective-permute", PAYLOAD, 1, lambda x: jax.lax.ppermute(x, "a", [(0, 1), (1, 0)])),
    ],
)
def test_collectives_one_by_one(mesh, kind, payload, sent, function):
    cost = cost_of(shard(mesh, function), array(EIGHT * 16, 32))
    assert cost.collectives == {kind: Collective(1, 1, payload, sent * payload)}


def test_the_partitioners_all_reduce(mesh):
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((("a", "b"),), ()))
    cost = cost_of(lambda x: x.T @ x, array(64, 16), in_shardings=split, out_shardings=whole)
    assert cost.collectives["all-reduce"].count == 1
    assert cost.collectives["all-reduce"].payload_bytes == 4 * 16 * 16
    assert cost.flops == close(2 * 8 * 16 * 16 + 16 * 16)  # a device's share, and the reduction


def test_a_collective_in_a_loop_is_executed_as_often_as_it_turns(mesh):
    def body(x, _):
        return jax.lax.psum(jnp.sin(x), ("a", "b")), None

    loop = shard(mesh, lambda x: jax.lax.scan(body, x, None, length=5)[0])
    (found,) = cost_of(loop, array(EIGHT * 16, 32)).collectives.values()
    assert (found.count, found.static_count, found.payload_bytes) == (5, 1, 5 * PAYLOAD)
    assert found.sent_bytes == 5 * 2 * PAYLOAD * 7 / 8


# As a TPU's compiler writes it: padded tiles, on-chip memory S(1), groups by mesh axes, no stated
# trip count.

TPU_TEXT = """HloModule jit_f, is_scheduled=true, num_partitions=16

%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  %y = f32[]{:T(128)} parameter(1)
  ROOT %add.1 = f32[]{:T(128)} add(%x, %y)
}

%taken (stack: f32[5,8,16], at: s32[]) -> f32[8,16] {
  %stack = f32[5,8,16]{2,1,0:T(8,128)} parameter(0)
  %at = s32[]{:T(128)S(6)} parameter(1)
  %zero.1 = s32[]{:T(128)} constant(0)
  %slice = f32[1,8,16]{2,1,0:T(8,128)} dynamic-slice(%stack, %at, %zero.1, %zero.1)
  ROOT %view = f32[8,16]{1,0:T(8,128)S(1)} bitcast(%slice)
}

%body (carry.1: (s32[], f32[8,16], f32[5,8,16])) -> (s32[], f32[8,16], f32[5,8,16]) {
  %carry.1 = (s32[]{:S(6)}, f32[8,16]{1,0:T(8,128)S(1)}, /*index=2*/f32[5,8,16]{2,1,0:T(8,128)}) parameter(0)
  %one = s32[]{:S(6)} constant(1)
  %old = s32[]{:S(6)} get-tuple-element(%carry.1), index=0
  %held = s32[]{:S(6)} copy(%old)
  %new = s32[]{:S(6)} add(%held, %one)
  %value = f32[8,16]{1,0:T(8,128)S(1)} get-tuple-element(%carry.1), index=1
  %all = f32[5,8,16]{2,1,0:T(8,128)} get-tuple-element(%carry.1), index=2
  %part = f32[8,16]{1,0:T(8,128)S(1)} fusion(%all, %held), kind=kLoop, calls=%taken, backend_config={"window_config":{"estimated_cycles":"100"}}
  %all-reduce.1 = f32[8,16]{1,0:T(8,128)S(1)} all-reduce(%part), channel_id=1, replica_groups=mesh['data'=4,'fsdp'=4] {'data'}, to_apply=%sum
  ROOT %next = (s32[]{:S(6)}, f32[8,16]{1,0:T(8,128)S(1)}, f32[5,8,16]{2,1,0:T(8,128)}) tuple(%new, %all-reduce.1, %all)
}

%condition (carry.2: (s32[], f32[8,16], f32[5,8,16])) -> pred[] {
  %carry.2 = (s32[]{:S(6)}, f32[8,16]{1,0:T(8,128)S(1)}, f32[5,8,16]{2,1,0:T(8,128)}) parameter(0)
  %end = s32[]{:T(128)} constant(5)
  %counter = s32[]{:S(6)} get-tuple-element(%carry.2), index=0
  ROOT %less = pred[]{:T(512)} compare(%counter, %end), direction=LT
}

ENTRY %main (argument: f32[5,8,16]) -> f32[8,16] {
  %argument = f32[5,8,16]{2,1,0:T(8,128)} parameter(0)
  %zero = s32[]{:S(6)} constant(0)
  %start = s32[]{:S(6)} copy(%zero)
  %space = f32[8,16]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="AllocateBuffer"
  %first = (s32[]{:S(6)}, f32[8,16]{1,0:T(8,128)S(1)}, f32[5,8,16]{2,1,0:T(8,128)}) tuple(%start, %space, %argument)
  %while.1 = (s32[]{:S(6)}, f32[8,16]{1,0:T(8,128)S(1)}, f32[5,8,16]{2,1,0:T(8,128)}) while(%first), condition=%condition, body=%body
  %result = f32[8,16]{1,0:T(8,128)S(1)} get-tuple-element(%while.1), index=1
  %copy-start = (f32[8,16]{1,0:T(8,128)}, f32[8,16]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%result)
  ROOT %copy-done = f32[8,16]{1,0:T(8,128)} copy-done(%copy-start)
}
"""  # noqa: E501


def test_a_trip_count_that_is_not_stated_is_read_from_the_counter():
    module = parse(TPU_TEXT)
    (loop,) = module.loops()
    assert module.devices == 16
    assert module.trip_count(loop) == 5
    for change in (("constant(5)", "parameter(1)"), ("=LT", "=NE"), ("constant(1)", "constant(2)")):
        other = parse(TPU_TEXT.replace(*change))
        assert other.trip_count(next(other.loops())) is None


def test_a_group_of_mesh_axes():
    module = parse(TPU_TEXT)
    reduce = module.instructions["all-reduce.1"]
    assert (module.group_size(reduce), module.payload(reduce)) == (4, 4 * 8 * 16)
    both = parse(TPU_TEXT.replace("{'data'}", "{'data','fsdp'}"))
    assert both.group_size(both.instructions["all-reduce.1"]) == 16


def test_only_main_memory_counts_and_of_a_stack_its_slices():
    slices, result = 5 * 4 * 8 * 128, 4 * 8 * 128  # 16 is padded to 128
    assert memory_traffic(parse(TPU_TEXT)) == slices + result
    spilled = TPU_TEXT.replace("T(8,128)S(1)", "T(8,128)")
    # Every slice is also written, read by the all-reduce and written by it; the copy is read.
    assert memory_traffic(parse(spilled)) == slices + result + 3 * slices + result


def test_sizes_of_arrays():
    assert shape_bytes("(bf16[3,5]{1,0}, pred[7], s4[4], f8e4m3fn[2], token[])") == 30 + 7 + 2 + 2
    assert array_bytes("bf16[3,5]{0,1:T(8,128)(2,1)}") == [2 * 8 * 128]
    assert array_bytes("f32[2,9,130]{2,1,0:T(8,128)}") == [4 * 2 * 16 * 256]
    assert array_bytes("f32[7]{0:T(128)S(1)}", anywhere=True) == [512]


# Estimates and tables


def some_cost(**figures):
    reduce = Collective(count=3, static_count=1, payload_bytes=3000, sent_bytes=5.625e3)
    values = dict(
        flops=197e9,
        bytes_accessed=4e9,
        hbm_traffic_bytes=819_000_000,
        hbm_peak_bytes=10**9,
        peak_memory_bytes=2 * 10**9,
        collectives={"all-reduce": reduce},
        cycles=1000,
        compile_seconds=1.0,
        flops_loops_once=1.0,
        bytes_loops_once=1.0,
        unknown_loops=0,
    )
    return Cost(**(values | figures))


def test_estimate_is_the_slower_of_two_and_the_collectives():
    topology = find_topology("v5e-16")
    both = estimate(some_cost(), topology)
    assert (both.compute, both.memory) == (pytest.approx(1e-3), pytest.approx(1e-3))
    assert both.interconnect == pytest.approx(5.625e3 / 100e9)  # two links of 50 GB/s
    assert both.total == pytest.approx(1e-3 + both.interconnect)
    longer = estimate(some_cost(flops=2 * 197e9), topology)
    assert longer.total - both.total == pytest.approx(1e-3)


def test_table_has_ratios_of_two_programs():
    topology = find_topology("v5e-16")
    text = table([("ours", some_cost(flops=2.5e9)), ("theirs", some_cost(flops=2e9))], topology)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert rows[0] == ["per chip of v5e-16", "ours", "theirs", "ratio"]
    assert ["flops", "2.5 G", "2 G", "1.2500"] in rows
    assert ["all-reduce, executed", "3", "3", "1.0000"] in rows
    assert any(row[0].startswith("**estimate") for row in rows)
    assert {len(row) for row in rows} == {4}


def test_table_of_one_program_and_of_one_that_does_not_fit():
    text = table([("big", some_cost(hbm_peak_bytes=17 * 10**9))], find_topology("v5e-16"))
    assert "17 GB of 16 GB: does NOT fit" in text
    assert "ratio" not in text


def test_table_says_what_is_not_known():
    text = table([("a", some_cost(unknown_loops=2, cycles=None))], find_topology("v5e-16"))
    assert "| loops of unknown length, counted once | 2 |" in text
    assert "cycles" not in text


def test_a_kind_of_collective_that_only_one_has():
    costs = [("a", some_cost()), ("b", some_cost(collectives={}))]
    assert "| all-reduce, executed | 3 | 0 | - |" in table(costs, find_topology("v4-16"))


# Topologies


def test_topologies_are_consistent():
    for name, topology in TOPOLOGIES.items():
        generation, _, size = name.partition("-")
        cores = 2 if generation in ("v4", "v5p") else 1
        assert topology.name == name and topology.chip is CHIPS[generation]
        assert topology.chips == math.prod(topology.shape) == int(size) // cores
        assert len(topology.wrap) == len(topology.shape) == (3 if cores == 2 else 2)
    for generation in CHIPS:
        sizes = [t.chips for t in TOPOLOGIES.values() if t.chip.name == generation]
        assert sizes == [8, 16, 32, 64, 128, 256]
        assert CHIPS[generation].source.startswith("https://")


def test_published_figures():
    """All-reduce bandwidth of a whole pod, per chip: what its links send in one direction."""
    assert find_topology("v5e-256").ici_bandwidth == pytest.approx(51.2e12 / 256)
    assert find_topology("v6e-256").ici_bandwidth == pytest.approx(102.4e12 / 256)
    assert find_topology("v4-512").ici_bandwidth == pytest.approx(1.1e15 / 4096)
    # Without the links that close its axes to rings, half as much.
    assert find_topology("v5e-16").ici_bandwidth == 100e9
    assert find_topology("v5e-128").wrap == (False, True)
    assert find_topology("v5p-128").wrap == (True, True, True)
    assert find_topology("v5p-64").wrap == (False, False, False)


def test_unknown_topology_names_the_nearest():
    with pytest.raises(ConfigError, match="unknown topology `v5e-15`; nearest: v5e-16"):
        find_topology("v5e-15")


def test_without_the_compiler_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[tpu\]'"):
        find_topology("v5e-16").devices()
