"""The training step with SOAP on the kernels, against SGD: time, the slowest step, and memory."""

import statistics

import jax

from orthojax.benchmarks.measurements import measurement, ratio
from orthojax.benchmarks.programs import BASELINE, SOAP, make_step, peak_memory, programs
from orthojax.benchmarks.timing import time_interleaved

WIDTHS = {16: 1.15, 64: 1.3}  # -> the largest ratio wanted
REFRESH_EVERY = 10


def measure(rounds: int, depth: int, clock):
    """Measures whole turns of refreshes, so that every kernel's is in, step by step."""
    found = []
    for width, at_most in WIDTHS.items():
        of = {name: programs(name, depth, width=width) for name in (BASELINE, SOAP)}
        steps = {name: make_step(compiled) for name, compiled in of.items()}
        # A round is a step of each; a kernel's turn comes in one of ten.
        seconds = time_interleaved(steps, max(rounds, REFRESH_EVERY + 1), clock)
        memory = {name: peak_memory(compiled.compiled_train_step) for name, compiled in of.items()}
        state = {
            name: sum(leaf.size for leaf in jax.tree.leaves(compiled.abstract_state.opt_state))
            / sum(leaf.size for leaf in jax.tree.leaves(compiled.abstract_state.params))
            for name, compiled in of.items()
        }
        last = seconds[SOAP][-REFRESH_EVERY:]
        net = f"plain-{depth}, width {width}"
        found += [
            measurement(f"step of {net}, SGD", seconds[BASELINE], unit="s"),
            ratio(
                f"step time, SOAP / SGD, {net}", seconds[SOAP], seconds[BASELINE], at_most=at_most
            ),
            measurement(
                f"slowest of ten steps / median, SOAP, {net}", [max(last) / statistics.median(last)]
            ),
            measurement(f"memory of a step, SOAP / SGD, {net}", [memory[SOAP] / memory[BASELINE]]),
            measurement(f"numbers of SOAP's state / of parameters, {net}", [state[SOAP]]),
        ]
    return found
