"""Where the time of a compiled program goes, by XLA's instructions."""

import collections
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import jax


class Share(NamedTuple):
    """What one instruction of a program takes.

    Attributes:
      milliseconds: per call of the program, summed over the threads that work on it.
      count: how often it is executed in a call.
      name: of the instruction.
      shape: of its result.
      origin: the end of the path of modules and functions that it comes from.
    """

    milliseconds: float
    count: float
    name: str
    shape: str
    origin: str


def profile(
    call: Callable[[], object], text: str, calls: int = 3, origin_length: int = 80
) -> list[Share]:
    """Times the instructions of a compiled program, the longest first.

    Args:
      call: executes the program and waits for it.
      text: the program, `compiled.as_text()`; it tells where instructions come from.
      calls: how many are averaged; one more, untimed, comes before.
      origin_length: how much of an origin is kept, in characters.

    Example: `launch/profile_step.py`.
    """
    origins = {}
    for line in text.splitlines():
        if parts := re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\([^=]*\)|\S+) ", line):
            origin = re.search(r'op_name="([^"]*)"', line)
            origins[parts[1]] = parts[2], origin[1][-origin_length:] if origin else ""
    call()
    with tempfile.TemporaryDirectory() as place:
        with jax.profiler.trace(place):
            for _ in range(calls):
                call()
        [path] = pathlib.Path(place).glob("**/*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    total, count = collections.Counter(), collections.Counter()
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                name = dict(event.stats).get("hlo_op")
                if name is not None:
                    total[name] += event.duration_ns
                    count[name] += 1
    return [
        Share(nanoseconds / 1e6 / calls, count[name] / calls, name, *origins.get(name, ("", "")))
        for name, nanoseconds in total.most_common()
    ]
