"""The line that tells how training goes."""

import os
import sys
import time
from collections.abc import Mapping
from typing import TextIO

from orthojax.console import is_terminal, tell


class Progress:
    """One live line on a terminal; a plain line for every update anywhere else.

    Args:
      total_steps: the step at which training ends.
      stream: where to write; once it is gone nothing is written (see `tell`).

    Example:
      >>> progress = Progress(150, stream=sys.stdout)
      >>> progress.begin(0)
      >>> progress.update(
      ...     120,
      ...     loss=0.03125,
      ...     train_accuracy=0.992,
      ...     accuracies={"test": 0.986},
      ...     images_per_second=812.4,
      ... )
      step 120/150  loss 0.031  train 99.2%  test 98.6%  812 images/s  0:00 left
      >>> progress.close()
    """

    def __init__(self, total_steps: int, stream: TextIO | None = None):
        self._total_steps = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._live = is_terminal(self._stream)
        self._line = ""
        self._accuracies: Mapping[str, float] = {}
        self._start: tuple[int, float] | None = None
        self._updated = False

    def begin(self, step: int) -> None:
        """Starts the clock: training begins now, after this step.

        The time left is reckoned from here at the first update, and from the first update ever
        after: so neither compilation nor what an earlier process did is in it.
        """
        self._start, self._updated = (step, time.monotonic()), False

    def update(
        self,
        step: int,
        *,
        loss: float,
        train_accuracy: float,
        accuracies: Mapping[str, float] | None = None,
        images_per_second: float,
    ) -> None:
        """Shows a step; accuracies are fractions of one, those of an evaluation by its splits.

        The live line goes on showing the last evaluation.
        """
        if accuracies or not self._live:
            self._accuracies = accuracies or {}
        fields = [
            f"step {step}/{self._total_steps}",
            f"loss {loss:.3f}",
            f"train {train_accuracy:.1%}",
            *(f"{split} {accuracy:.1%}" for split, accuracy in self._accuracies.items()),
            f"{images_per_second:,.0f} images/s",
            self._time_left(step),
        ]
        self._show("  ".join(field for field in fields if field))

    def message(self, text: str) -> None:
        """Writes a line of its own, above the live line."""
        line = self._line
        self._erase()
        tell(text, self._stream)
        if line:
            self._show(line)

    def close(self) -> None:
        """Ends the live line, so that what is written next begins a new one."""
        if self._line:
            tell("", self._stream)
            self._line = ""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _show(self, line: str) -> None:
        if not self._live:
            tell(line, self._stream)
        else:
            self._erase()
            # A line wider than the terminal would wrap, and \r would not get back to its start.
            self._line = line[: self._columns() - 1]
            tell(self._line, self._stream, end="")

    def _erase(self) -> None:
        if self._line:
            tell("", self._stream, end="\r" + " " * len(self._line) + "\r")
            self._line = ""

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def _time_left(self, step: int) -> str:
        if self._start is None:
            return ""
        now = time.monotonic()
        first_step, then = self._start
        if not self._updated:
            self._start, self._updated = (step, now), True
        if step <= first_step:
            return ""
        seconds = round((now - then) / (step - first_step) * (self._total_steps - step))
        minutes, seconds = divmod(max(seconds, 0), 60)
        hours, minutes = divmod(minutes, 60)
        return (
            f"{hours}:{minutes:02}:{seconds:02} left" if hours else f"{minutes}:{seconds:02} left"
        )
