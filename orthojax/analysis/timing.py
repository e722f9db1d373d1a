"""Comparing the speed of programs on a machine that is never quite at rest."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Ratio(NamedTuple):
    """How many times slower than the baseline, over the rounds: median, quartiles."""

    median: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.lower:.3f}-{self.upper:.3f})"


def time_interleaved(
    functions: Mapping[str, Callable[[], object]], rounds: int
) -> dict[str, list[float]]:
    """Seconds of every function in every round; a round calls each of them once, in turn.

    What else the machine does then falls on all of them alike, and the ratios within a round mean
    something where single times do not. The order turns round from one round to the next. Each
    function is called once before, untimed, and must itself wait for its result.

    Example:
      >>> seconds = time_interleaved({"a": lambda: None, "b": lambda: None}, rounds=3)
      >>> [len(times) for times in seconds.values()]
      [3, 3]
    """
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(rounds):
        names = list(functions) if index % 2 == 0 else list(reversed(functions))
        for name in names:
            start = time.perf_counter()
            functions[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(seconds: Mapping[str, list[float]], baseline: str) -> dict[str, Ratio]:
    """Ratios to the baseline, round by round.

    Args:
      seconds: what `time_interleaved` returned, of at least two rounds.
      baseline: the name of the function to compare with.

    Example:
      >>> print(ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 4.0, 8.0]}, baseline="a")["b"])
      2.000 (2.000-2.000)
    """
    result = {}
    for name, times in seconds.items():
        each = [t / b for t, b in zip(times, seconds[baseline], strict=True)]
        lower, median, upper = statistics.quantiles(each, n=4, method="inclusive")
        result[name] = Ratio(median, lower, upper)
    return result
