"""Comparing the speed of programs on a machine that is never quite at rest."""

import time
from collections.abc import Callable, Mapping
from typing import Any


def time_interleaved(
    functions: Mapping[Any, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Any, list[float]]:
    """Seconds of every function in every round; a round calls each of them once, in turn.

    What else the machine does then falls on all of them alike, and the ratios within a round mean
    something where single times do not. The order turns round from one round to the next. Each
    function is called once before, untimed, and must itself wait for its result.

    Args:
      functions: by name.
      rounds: how many.
      clock: `time.perf_counter`, or `time.process_time` for the CPU time of this process and all
        its threads, in which what other processes do hardly shows.

    Example:
      >>> seconds = time_interleaved({"a": lambda: None, "b": lambda: None}, rounds=3)
      >>> [len(times) for times in seconds.values()]
      [3, 3]
    """
    for function in functions.values():
        function()
    seconds: dict[Any, list[float]] = {name: [] for name in functions}
    for index in range(rounds):
        names = list(functions) if index % 2 == 0 else list(reversed(functions))
        for name in names:
            start = clock()
            functions[name]()
            seconds[name].append(clock() - start)
    return seconds
