"""Compiling, and starting: of deep nets against shallow ones, and for the second time."""

import functools
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax

from orthojax.benchmarks.measurements import measurement, ratio
from orthojax.benchmarks.programs import METHOD, experiment, lower_on_digits
from orthojax.benchmarks.timing import time_interleaved
from orthojax.training.compiled import abstract_state, lower_train_step

TRAIN = str(pathlib.Path(__file__).resolve().parent.parent / "train.py")


def measure(rounds: int, depth: int):
    """Measures compilation; each of the at most three rounds compiles everything anew."""
    rounds = max(2, min(rounds, 3))
    seconds = time_interleaved(
        {depth: functools.partial(_compile, depth) for depth in (depth, 110)}, rounds
    )
    on_digits = time_interleaved(
        {d: functools.partial(_compile_on_digits, d) for d in (44, 1004)}, rounds
    )
    with tempfile.TemporaryDirectory() as place:
        first, second = (_train(place, f"run_{index}") for index in (1, 2))
    return [
        measurement(f"compiling the step of plain-{depth}", seconds[depth], unit="s"),
        measurement("compiling the step of plain-110", seconds[110], unit="s"),
        ratio(
            f"compile time, plain-110 / plain-{depth}", seconds[110], seconds[depth], at_most=1.5
        ),
        ratio("compile time, 1,004 layers / 44, digits", on_digits[1004], on_digits[44], at_most=2),
        measurement("one step on the digits, empty compilation cache", [first], unit="s"),
        measurement("the same for the second time", [second], unit="s", at_most=15),
        measurement(
            "train.py --help", [_run("--help") for _ in range(rounds)], unit="s", at_most=2
        ),
    ]


def _compile(depth):
    jax.clear_caches()
    made = experiment(METHOD, depth)
    lower_train_step(made, abstract_state(made)).compile()


def _compile_on_digits(depth):
    jax.clear_caches()
    lower_on_digits(depth).compile()


def _train(place, workdir):
    options = ["--config.steps=1", f"--config.dataset.data_dir={place}/data"]
    return _run(*options, f"--workdir={place}/{workdir}", XDG_CACHE_HOME=place)


def _run(*arguments, **environment):
    start = time.perf_counter()
    command = [sys.executable, TRAIN, *arguments]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | environment)
    return time.perf_counter() - start
