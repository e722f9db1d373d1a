"""What a benchmark found: figures with their spread, their targets, and a baseline to hold them to.

Ratios of what was measured side by side mean something on another day and, mostly, on another
machine; so only they are compared with a baseline. Seconds and images/s are told for what they are.
"""

import dataclasses
import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orthojax.errors import UserError
from orthojax.pictures.picture import COLORS, clear_frame, new_picture, write_picture
from orthojax.storage.paths import write_atomic

# How much worse than a baseline the better quartile has to be than its worse one, relatively.
TOLERANCE = 0.05


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One quantity, over several rounds.

    Attributes:
      name: what was measured.
      median: over the rounds.
      lower: the first quartile; the median itself where nothing varies.
      upper: the third.
      rounds: how many there were.
      unit: such as "s"; empty for a ratio.
      at_most: the target, or None.
      at_least: likewise, where more is better.
    """

    name: str
    median: float
    lower: float
    upper: float
    rounds: int = 1
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def more_is_better(self) -> bool:
        """Whether the target is a floor."""
        return self.at_least is not None

    @property
    def target(self) -> float | None:
        """`at_most` or `at_least`, whichever there is."""
        return self.at_least if self.more_is_better else self.at_most

    @property
    def met(self) -> bool | None:
        """Whether the median meets the target; None without one."""
        if self.target is None:
            return None
        return self.median >= self.target if self.more_is_better else self.median <= self.target

    def worse_than(self, baseline: "Measurement") -> bool:
        """Whether a ratio's better quartile is worse than the baseline's worse one, by 5 %.

        Example:
          >>> old = Measurement("time", median=1.0, lower=0.98, upper=1.02, at_most=1.05)
          >>> new = Measurement("time", median=1.2, lower=1.1, upper=1.3, at_most=1.05)
          >>> new.worse_than(old), old.worse_than(new)
          (True, False)
        """
        if self.unit:
            return False
        if self.more_is_better:
            return self.upper < baseline.lower * (1 - TOLERANCE)
        return self.lower > baseline.upper * (1 + TOLERANCE)


def measurement(name: str, values: Iterable[float], **options: Any) -> Measurement:
    """A measurement from its value in every round.

    Args:
      name: see `Measurement`.
      values: at least one.
      **options: `unit`, `at_most`, `at_least`.

    Example:
      >>> measurement("time", [3.0, 1.0, 2.0], unit="s").median
      2.0
    """
    values = list(values)
    lower = median = upper = values[0]
    if len(values) > 1:
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
    return Measurement(name, median, lower, upper, len(values), **options)


def ratio(name: str, above: Sequence[float], below: Sequence[float], **options: Any) -> Measurement:
    """A measurement of the ratios of two measured values, round by round.

    Args:
      name: see `Measurement`.
      above: the one in every round, such as seconds from `time_interleaved`.
      below: the other, in as many rounds.
      **options: see `measurement`.

    Example:
      >>> ratio("time", [2.0, 4.0, 8.0], [1.0, 2.0, 4.0], at_most=1.5).median
      2.0
    """
    return measurement(name, [a / b for a, b in zip(above, below, strict=True)], **options)


def table(measurements: Sequence[Measurement]) -> str:
    """A Markdown table, one row for each measurement.

    Example:
      >>> print(table([measurement("step, ours / theirs", [0.9, 1.0, 1.1], at_most=1.05)]))
      | | median | quartiles | target | |
      |---|---|---|---|---|
      | step, ours / theirs | 1.000 | 0.950 to 1.050 | at most 1.05 | met |
    """
    lines = ["| | median | quartiles | target | |", "|---|---|---|---|---|"]
    for found in measurements:
        spread = f"{_number(found.lower)} to {_number(found.upper)}" if found.rounds > 1 else "-"
        target = ""
        if found.target is not None:
            target = f"at {'least' if found.more_is_better else 'most'} {found.target:g}"
        verdict = {None: "", True: "met", False: "**missed**"}[found.met]
        median = f"{_number(found.median)} {found.unit}".rstrip()
        lines.append(f"| {found.name} | {median} | {spread} | {target} | {verdict} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}" if value < 100 else f"{value:.1f}"


def save(path: str | os.PathLike, measurements: Sequence[Measurement], **about: Any) -> None:
    """Writes measurements as JSON.

    Args:
      path: the file.
      measurements: what was found.
      **about: the command, the machine, versions.
    """
    record = {**about, "measurements": [dataclasses.asdict(found) for found in measurements]}
    write_atomic(path, (json.dumps(record, indent=1) + "\n").encode())


def read(path: str | os.PathLike) -> dict[str, Measurement]:
    """The measurements of a file that `save` wrote, by name; `UserError` if it is no such file."""
    try:
        with open(path, encoding="utf-8") as file:
            return {
                found["name"]: Measurement(**found) for found in json.load(file)["measurements"]
            }
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{os.fspath(path)} holds no measurements of a benchmark ({error})"
        ) from None


def regressions(
    measurements: Iterable[Measurement], baseline: Mapping[str, Measurement]
) -> list[str]:
    """What has become worse than a baseline, a line for each.

    Example:
      >>> old, new = (measurement("time", [value]) for value in (1.0, 2.0))
      >>> regressions([new], {"time": old})
      ['time: 2.000, where the baseline has 1.000']
    """
    return [
        f"{found.name}: {_number(found.median)}, where the baseline has "
        f"{_number(baseline[found.name].median)}"
        for found in measurements
        if found.name in baseline and found.worse_than(baseline[found.name])
    ]


def draw(measurements: Sequence[Measurement], path: str | os.PathLike, title: str = "") -> None:
    """Draws the ratios, a dot with its quartiles each, beside their targets; `.png` or `.svg`.

    Example:
      >>> import tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "measurements.png")
      >>> draw([measurement("time", [0.9, 1.0, 1.1], at_most=1.05)], path)
      >>> os.path.exists(path)
      True
    """
    ratios = [found for found in measurements if not found.unit][::-1]  # the first stands on top
    picture = new_picture(9, 0.8 + 0.32 * max(len(ratios), 1))
    axes = picture.subplots()
    for row, found in enumerate(ratios):
        ends = [[found.median - found.lower], [found.upper - found.median]]
        color = COLORS[1] if found.met is False else COLORS[0]
        axes.errorbar([found.median], [row], xerr=ends, fmt="o", color=color, markersize=4)
        if found.target is not None:
            marker = ">" if found.more_is_better else "<"  # where the median should be
            axes.plot([found.target], [row], marker, color="black", fillstyle="none")
    axes.set_yticks(range(len(ratios)), [found.name for found in ratios])
    axes.set_xscale("log")
    axes.set_xlabel("ratio (dot: median and quartiles; triangle: its target, and which way)")
    axes.set_title(title)
    clear_frame(axes)
    write_picture(picture, path)
