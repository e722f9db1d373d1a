"""What a compiled program costs on one of its devices, and an estimate of how long that takes.

XLA's own `cost_analysis()` counts the body of a loop once, on CPUs and on TPUs, however often the
loop turns. Here it counts as often. The body is analysed by XLA too, as a program of its own.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from orthojax.analysis.hlo import COLLECTIVES, Module, parse
from orthojax.analysis.memory_traffic import memory_traffic
from orthojax.errors import UserError
from orthojax.topology import Topology


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a program, as one device takes part in them.

    Attributes:
      count: how many are executed.
      static_count: how many there are in the program's text, where one in a loop is one.
      payload_bytes: what they reduce, gather or send, summed over all that are executed.
      sent_bytes: what one device sends for that in a ring: of a payload S on n devices
        2 S (n - 1) / n to all-reduce it, S (n - 1) / n to gather or scatter it, S to permute it.
    """

    count: int
    static_count: int
    payload_bytes: int
    sent_bytes: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Figures of a compiled program, on one of its devices.

    Attributes:
      flops: operations. A multiplication and an addition are two; an exponential is none.
      bytes_accessed: what all its instructions read and write, in whatever memory, with the padding
        of layouts.
      hbm_traffic_bytes: what of that goes to or comes from main memory
        (`orthojax.analysis.memory_traffic`).
      hbm_peak_bytes: what XLA allocates in main memory: arguments, results, temporaries, code.
      peak_memory_bytes: XLA's figure of what is alive at once at most, in whatever memory.
      collectives: by kind.
      cycles: sum of the compiler's own estimates for instructions, where it states them (for TPUs);
        there is none for collectives and for scalar arithmetic. None where it states none.
      compile_seconds: compilation, without tracing.
      flops_loops_once: `flops` as XLA's `cost_analysis()` has it.
      bytes_loops_once: `bytes_accessed` as XLA's `cost_analysis()` has it.
      unknown_loops: how many loops count once here too, since their trip count is not known.
    """

    flops: float
    bytes_accessed: float
    hbm_traffic_bytes: int
    hbm_peak_bytes: int
    peak_memory_bytes: int
    collectives: dict[str, Collective]
    cycles: int | None
    compile_seconds: float
    flops_loops_once: float
    bytes_loops_once: float
    unknown_loops: int


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Estimate of a program's time, in seconds, from published figures; it was never run.

    Attributes:
      compute: flops at the chip's peak rate.
      memory: traffic of the main memory at its bandwidth.
      interconnect: bytes sent at the bandwidth of the links, without any latency.
      total: the larger of the first two, and the third.
    """

    compute: float
    memory: float
    interconnect: float
    total: float


def measure(lowered: jax.stages.Lowered) -> Cost:
    """Compiles a program and reads off what it costs.

    Raises:
      UserError: it needs more memory than the device has; the message says how much.

    Example:
      >>> cost = measure(jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), "float32")))
      >>> cost.flops, cost.collectives
      (1024.0, {})
    """
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the program does not fit: {str(error).splitlines()[0]}") from None
    seconds = time.monotonic() - start
    module, counted = parse(compiled.as_text()), compiled.cost_analysis()
    flops, accessed = _repeated(module)
    loops = [found for found, _ in module.walk() if found.opcode == "while"]
    return Cost(
        flops=counted.get("flops", 0.0) + flops,
        bytes_accessed=counted["bytes accessed"] + accessed,
        hbm_traffic_bytes=memory_traffic(module),
        hbm_peak_bytes=_main_memory(compiled.memory_analysis()),
        peak_memory_bytes=compiled.memory_analysis().peak_memory_in_bytes,
        collectives=_collectives(module),
        cycles=_cycles(module),
        compile_seconds=seconds,
        flops_loops_once=counted.get("flops", 0.0),
        bytes_loops_once=counted["bytes accessed"],
        unknown_loops=sum(module.trip_count(loop) is None for loop in loops),
    )


def estimate(cost: Cost, topology: Topology) -> StepTime:
    """How long the chips of a slice need, by their published figures alone.

    Example:
      >>> from orthojax.topology import find_topology
      >>> cost = measure(jax.jit(lambda x: x @ x).lower(jax.numpy.ones((8, 8))))
      >>> cost = dataclasses.replace(cost, flops=197e9, hbm_traffic_bytes=819e5)
      >>> estimate(cost, find_topology("v5e-16"))
      StepTime(compute=0.001, memory=0.0001, interconnect=0.0, total=0.001)
    """
    compute = cost.flops / topology.chip.flops
    memory = cost.hbm_traffic_bytes / topology.chip.hbm_bandwidth
    sent = sum(collective.sent_bytes for collective in cost.collectives.values())
    interconnect = sent / topology.ici_bandwidth
    return StepTime(compute, memory, interconnect, max(compute, memory) + interconnect)


def _main_memory(sizes: Any) -> int:
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return held + sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes


def _collectives(module: Module) -> dict[str, Collective]:
    found: dict[str, Collective] = {}
    channels = set()
    for instruction, times in module.walk():
        kind = instruction.opcode.removesuffix("-start")
        # For TPUs a collective may be spread over several fusions; it keeps its channel.
        channel = re.search(r"\bchannel_id=(\d+)", instruction.attributes)
        if kind in COLLECTIVES and (channel is None or channel[1] not in channels):
            channels.update(channel.groups() if channel else ())
            payload = module.payload(instruction)
            sent = _sent_in_ring(kind, payload, module.group_size(instruction))
            old = found.get(kind, Collective(0, 0, 0, 0.0))
            found[kind] = Collective(
                count=old.count + times,
                static_count=old.static_count + 1,
                payload_bytes=old.payload_bytes + times * payload,
                sent_bytes=old.sent_bytes + times * sent,
            )
    return found


def _sent_in_ring(kind: str, payload: int, devices: int) -> float:
    if kind == "collective-permute":
        return payload
    return (2 if kind == "all-reduce" else 1) * payload * (devices - 1) / devices


def _cycles(module: Module) -> int | None:
    stated = [
        times * int(cycles)
        for instruction, times in module.walk(fusions=False)
        for cycles in re.findall(r'"estimated_cycles":"(\d+)"', instruction.attributes)
    ]
    return sum(stated) if stated else None


def _repeated(module: Module) -> tuple[float, float]:
    """Flops and bytes accessed of all turns of the program's loops but the first of each."""
    analyse = functools.cache(lambda name: _analyse(module, name))

    def beyond(name):
        """What XLA leaves out when it counts a computation: flops, bytes accessed."""
        flops = accessed = 0.0
        for loop in module.loops(name):
            turns, body = module.trip_count(loop), loop.attribute("body")
            turns = 1 if turns is None else turns
            (once_flops, once_accessed), (more_flops, more_accessed) = analyse(body), beyond(body)
            flops += turns * (once_flops + more_flops) - once_flops
            accessed += turns * (once_accessed + more_accessed) - once_accessed
        return flops, accessed

    return beyond(module.entry)


def _analyse(module: Module, name: str) -> tuple[float, float]:
    """XLA's analysis of one computation with all that it calls: flops, bytes accessed."""
    # No public function of JAX analyses less than a whole program, or one from its text.
    from jaxlib import _hlo, _jax

    # What a computation calls stands before it.
    texts = {key: computation.text for key, computation in module.computations.items()}
    called = list(texts.values())[: list(texts).index(name)]
    text = "\n\n".join(("HloModule part", *called, f"ENTRY {texts[name]}"))
    # Source positions refer to tables that are not part of this text.
    part = _hlo.hlo_module_from_text(re.sub(r" ?stack_frame_id=\d+", "", text))
    costs = _jax.hlo_module_cost_analysis(jax.devices("cpu")[0].client, part)
    return costs.get("flops", 0.0), costs.get("bytes accessed", 0.0)


def table(costs: Sequence[tuple[str, Cost]], topology: Topology) -> str:
    """A Markdown table of figures per chip; of two programs with the first's ratio to the second.

    Args:
      costs: one or two programs, each with its name.
      topology: what they were compiled for.
    """
    columns = [_figures(cost, topology) for _, cost in costs]
    heads = [f"per chip of {topology.name}", *(name for name, _ in costs)]
    lines = [heads + ["ratio"] * (len(costs) == 2)]
    lines.append(["---"] * len(lines[0]))
    for row in dict.fromkeys(name for column in columns for name in column):
        figures = [column.get(row, (0, "0")) for column in columns]
        line = [row, *(text for _, text in figures)]
        if len(costs) == 2:
            (ours, _), (theirs, _) = figures
            line.append(f"{ours / theirs:.4f}" if theirs else "-")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _figures(cost: Cost, topology: Topology) -> dict[str, tuple[float, str]]:
    """What a figure is called -> the number, and how it is printed."""
    figures = {
        "flops": (cost.flops, ""),
        "bytes accessed, on chip too": (cost.bytes_accessed, "B"),
        "HBM traffic": (cost.hbm_traffic_bytes, "B"),
        "peak HBM": (cost.hbm_peak_bytes, "B"),
        "alive at once, on chip too": (cost.peak_memory_bytes, "B"),
    }
    for kind, found in cost.collectives.items():
        figures[f"{kind}, in the program"] = (found.static_count, "")
        figures[f"{kind}, executed"] = (found.count, "")
        figures[f"{kind}, payload"] = (found.payload_bytes, "B")
    if cost.unknown_loops:
        figures["loops of unknown length, counted once"] = (cost.unknown_loops, "")
    if cost.cycles is not None:
        figures["cycles, as the compiler estimates"] = (cost.cycles, "")
    time = estimate(cost, topology)
    figures["compile time"] = (cost.compile_seconds, "s")
    figures["estimate: flops at peak"] = (time.compute, "s")
    figures["estimate: HBM traffic at its bandwidth"] = (time.memory, "s")
    figures["estimate: collectives at ICI bandwidth"] = (time.interconnect, "s")
    figures["**estimate: step time**"] = (time.total, "s")
    printed = {name: (value, _si(value, unit)) for name, (value, unit) in figures.items()}
    needs, has = cost.hbm_peak_bytes, topology.chip.hbm_bytes
    fits = "fits" if needs <= has else "does NOT fit"
    printed["peak HBM"] = (needs, f"{_si(needs, 'B')} of {_si(has, 'B')}: {fits}")
    return printed


def _si(value: float, unit: str = "") -> str:
    """Four significant digits and a prefix: 0.00012345 s is 123.5 µs."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""), (1e-3, "m")):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}{unit}".rstrip()
    return f"{value / 1e-6:.4g} µ{unit}" if value else f"0 {unit}".rstrip()
