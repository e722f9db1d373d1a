"""What a compiled program costs on one of its devices, as XLA reports it."""

import dataclasses
import os
import re
import time
from collections.abc import Sequence
from typing import Any

import jax

from orthojax.errors import ConfigError, UserError
from orthojax.extras import require


@dataclasses.dataclass(frozen=True)
class Cost:
    """Costs of a compiled program, on one of its devices.

    XLA counts the body of a loop once, however often the loop turns, and so does every figure here
    but `memory`. Compare unrolled programs.

    Attributes:
      flops: operations. A multiplication and an addition are two; an exponential is none.
      bytes_accessed: what all instructions read and write, in whatever memory.
      memory: bytes that XLA allocates: arguments, results, temporaries and code.
      all_reduces: see `all_reduces`.
      compile_seconds: compilation, without tracing.
    """

    flops: float
    bytes_accessed: float
    memory: int
    all_reduces: int
    compile_seconds: float


_ROWS = {
    "flops": ("flops", ""),
    "bytes_accessed": ("bytes accessed", "B"),
    "memory": ("memory", "B"),
    "all_reduces": ("all-reduces", ""),
    "compile_seconds": ("compile time", "s"),
}


def all_reduces(compiled: jax.stages.Compiled) -> int:
    """How many all-reduces a compiled program has, asynchronous ones included.

    One in the body of a loop counts once; one that the TPU compiler spreads over several fusions
    counts in each.

    Example:
      >>> all_reduces(jax.jit(lambda x: 2 * x).lower(1.0).compile())
      0
    """
    return len(re.findall(r" all-reduce(?:-start)?\(", compiled.as_text()))


def measure(lowered: jax.stages.Lowered) -> Cost:
    """Compiles a program and asks XLA what it costs.

    Raises:
      UserError: it needs more memory than the device has; the message says how much.

    Example:
      >>> measure(jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((8, 8), "float32"))).flops
      1024.0
    """
    start = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the program does not fit: {str(error).splitlines()[0]}") from None
    seconds = time.monotonic() - start
    counted, sizes = compiled.cost_analysis(), compiled.memory_analysis()
    return Cost(
        flops=counted.get("flops", 0.0),
        bytes_accessed=counted["bytes accessed"],
        memory=sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
        + sizes.generated_code_size_in_bytes,
        all_reduces=all_reduces(compiled),
        compile_seconds=seconds,
    )


def table(costs: Sequence[tuple[str, Cost]]) -> str:
    """A Markdown table of costs per device; of two programs with the first's ratio to the second.

    Args:
      costs: one or two programs, each with its name.

    Example:
      >>> print(table([("a", Cost(2e9, 3e6, 4000, 5, 0.5)), ("b", Cost(1e9, 3e6, 4000, 0, 0.5))]))
      | per device | a | b | ratio |
      | --- | --- | --- | --- |
      | flops | 2 G | 1 G | 2.000 |
      | bytes accessed | 3 MB | 3 MB | 1.000 |
      | memory | 4 kB | 4 kB | 1.000 |
      | all-reduces | 5 | 0 | - |
      | compile time | 0.5 s | 0.5 s | 1.000 |
    """
    two = len(costs) == 2
    lines = [["per device", *(name for name, _ in costs)] + ["ratio"] * two]
    lines.append(["---"] * len(lines[0]))
    for field, (name, unit) in _ROWS.items():
        values = [getattr(cost, field) for _, cost in costs]
        line = [name, *(_si(value, unit) for value in values)]
        if two:
            line.append(f"{values[0] / values[1]:.3f}" if values[1] else "-")
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tpu_devices(topology: str) -> list[Any]:
    """The devices of a slice of a TPU pod, for compiling only; no TPU is needed.

    Args:
      topology: JAX's name of it, generation and chips along each axis: `v5e:4x4`, `v5p:2x2x2`.

    Returns:
      list of `jax.Device`.

    Raises:
      ConfigError: there is no such slice, or the TPU compiler is not installed or is busy.
    """
    require("tpu", "compiling for TPUs")
    # Read by the compiler when it is loaded, which is now; else it would look for a TPU.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(topology, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        if "lockfile" in str(error):
            raise ConfigError(
                f"the TPU compiler serves one process at a time; wait for the other: {error}"
            ) from None
        raise ConfigError(
            f"unknown topology `{topology}` ({str(error).splitlines()[0]}); write the generation "
            "and the chips along each axis, such as v5e:4x4 or v5p:2x2x2"
        ) from None


def _si(value: float, unit: str = "") -> str:
    """Four significant digits and a prefix."""
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.4g} {prefix}{unit}".rstrip()
    return f"{value:.4g} {unit}".rstrip()
