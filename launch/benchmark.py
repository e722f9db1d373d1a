"""Measures what the method costs: a training step with it against the same net with SGD + L2.

python launch/benchmark.py                        # CIFAR-10 plain-44, 32×32, batch 128
python launch/benchmark.py --depth=20 --rounds=5 --output=runs/step_cost.json

Variants take turns within a round, and ratios are taken round by round. No data set is needed.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import sys

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from configs.cifar10_plain import get_config  # noqa: E402
from orthojax import data  # noqa: E402
from orthojax.analysis.timing import ratios, time_interleaved  # noqa: E402
from orthojax.experiment import build  # noqa: E402
from orthojax.programs import compile_programs  # noqa: E402

BASELINE = "SGD + L2"
VARIANTS = {  # name -> regularizer, modulation
    BASELINE: ("l2", False),
    "SGD + ortho": ("ortho", False),
    "SGD + L2 + modulation": ("l2", True),
    "SGD + ortho + modulation": ("ortho", True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--depth", type=int, default=44)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=pathlib.Path, help="write the record here as JSON")
    arguments = parser.parse_args()
    programs = {name: compile_variant(name, arguments.depth) for name in VARIANTS}
    seconds = time_interleaved({n: make_step(p) for n, p in programs.items()}, arguments.rounds)
    relative = ratios(seconds, BASELINE)
    memory = {name: peak_memory(p.train_step) for name, p in programs.items()}
    print(f"\nplain-{arguments.depth}, batch 128 of 32×32×3, {arguments.rounds} rounds")
    print("| | s/step (median) | time, ratio (quartiles) | memory, MiB | ratio |")
    print("|---|---|---|---|---|")
    for name in VARIANTS:
        median, mib = statistics.median(seconds[name]), memory[name] / 2**20
        share = memory[name] / memory[BASELINE]
        print(f"| {name} | {median:.3f} | {relative[name]} | {mib:,.1f} | {share:.4f} |")
    if arguments.output:
        record = {"depth": arguments.depth, "seconds": seconds, "memory_bytes": memory}
        record |= {"jax": jax.__version__, "cores": os.cpu_count(), "cpu": platform.processor()}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(record, indent=2) + "\n")


def compile_variant(name, depth):
    regularizer, modulated = VARIANTS[name]
    config = get_config(f"depth={depth},method={'ortho' if modulated else 'l2'}")
    config.regularizer = {"name": regularizer, "coefficient": 1e-4}
    config.mesh.data = 1
    programs = compile_programs(build(config, load=data.stand_in))
    print(f"{name}: compiled in {programs.compile_seconds:.1f} s", file=sys.stderr)
    return programs


def make_step(programs):
    """A function that makes one training step on random images, and waits for it."""
    key, state = jax.random.key(0), [programs.init()]
    image = jax.random.randint(key, (128, 32, 32, 3), 0, 256).astype(jnp.uint8)
    batch = programs.put({"image": image, "label": jnp.arange(128, dtype=jnp.int32) % 10})

    def step():
        state[0], metrics = programs.train_step(state[0], batch)
        jax.block_until_ready(metrics)

    return step


def peak_memory(compiled) -> int:
    """Bytes of a compiled program's arguments, results and temporary buffers; aliases once."""
    sizes = compiled.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return held + sizes.temp_size_in_bytes


if __name__ == "__main__":
    main()
