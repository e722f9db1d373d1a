"""The training step of a plain net: what the method costs, scanning, and PyTorch for comparison."""

import importlib.util
import itertools
import statistics
import sys

import jax
import optax

from orthojax import optax_ortho
from orthojax.benchmarks.measurements import measurement, ratio
from orthojax.benchmarks.programs import (
    BASELINE,
    BATCH,
    METHOD,
    OBSERVED,
    SOAP,
    VARIANTS,
    make_step,
    programs,
)
from orthojax.benchmarks.timing import time_interleaved
from orthojax.training.observe import observe

UNROLLED = "unrolled"
PYTORCH = "PyTorch"
COMPILED = "torch.compile"


def measure(rounds: int, depth: int, clock, torch_compile: bool = False):
    """Measures the training step, beside PyTorch's, eager and, if wanted, compiled."""
    steps = {name: make_step(programs(name, depth)) for name in VARIANTS if name != SOAP}
    steps[OBSERVED] = make_step(programs(OBSERVED, depth), observe=jax.jit(observe))
    steps["regularizer"] = _regularizer(programs(BASELINE, depth))
    steps[UNROLLED] = make_step(programs(BASELINE, depth, scan=False))
    if importlib.util.find_spec("torch"):
        from orthojax.benchmarks import torch_plain

        layouts = {True: "channels last", False: "channels first"}
        forms = {False: PYTORCH, True: COMPILED} if torch_compile else {False: PYTORCH}
        for (channels_last, layout), (compiled, name) in itertools.product(
            layouts.items(), forms.items()
        ):
            steps[f"{name}, {layout}"] = torch_plain.make_step(
                depth, BATCH, channels_last=channels_last, compiled=compiled
            )
    else:
        print("PyTorch is not installed, so it is not compared with", file=sys.stderr)
    seconds = time_interleaved(steps, rounds, clock)
    for form in (PYTORCH, COMPILED):
        candidates = [times for name, times in seconds.items() if name.startswith(form)]
        if candidates:  # the better layout
            seconds[form] = min(candidates, key=statistics.median)

    def relative(name, above, below, **target):
        return ratio(name, seconds[above], seconds[below], **target)

    found = [
        measurement(f"step of plain-{depth}, {BASELINE}", seconds[BASELINE], unit="s"),
        relative("step time, ortho + modulation / L2", METHOD, BASELINE, at_most=1.03),
        relative("step time, ortho / L2", "SGD + ortho", BASELINE),
        relative("step time, L2 + modulation / L2", "SGD + L2 + modulation", BASELINE),
        relative("step time, observed at every step / L2", OBSERVED, BASELINE, at_most=1.1),
        relative("regularizer alone / step", "regularizer", BASELINE, at_most=0.01),
        relative("step time, scanned / unrolled", BASELINE, UNROLLED, at_most=1.15),
    ]
    if PYTORCH in seconds:
        found.append(
            measurement(f"step of plain-{depth}, eager {PYTORCH}", seconds[PYTORCH], unit="s")
        )
        found.append(relative("step time, scanned / PyTorch", BASELINE, PYTORCH, at_most=1.0))
        found.append(relative("step time, unrolled / PyTorch", UNROLLED, PYTORCH))
    if COMPILED in seconds:
        found.append(relative(f"step time, scanned / {COMPILED}", BASELINE, COMPILED))
    return found


def _regularizer(compiled):
    """Adds the penalty's gradient to the updates of all parameters, and nothing else."""
    ortho = optax_ortho(1e-4)
    params = compiled.init().params
    update = jax.jit(lambda updates: ortho.update(updates, ortho.init(params), params)[0])
    updates = optax.tree.zeros_like(params)
    return lambda: jax.block_until_ready(update(updates))
