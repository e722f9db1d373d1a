"""Reads the checkpoints of a run at any moment, and changes nothing: training may go on beside."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from orthojax.errors import WorkdirError
from orthojax.storage.checksums import find_damage
from orthojax.storage.paths import NEVER, inside, is_remote, name_fault

# In a checkpoint, a file of JSON: position of the data, layout of the state, the best so far.
POSITION = "position/metadata"
_ATTEMPTS = 50  # of a reader whose checkpoints are removed while it reads them
_SECONDS = 0.1  # in which a checkpoint that is being removed becomes another

T = TypeVar("T")


def saved_steps(directory: Any) -> list[int]:
    """The steps of which there are finished checkpoints in a directory, in ascending order."""
    try:
        paths = {path.name: path for path in directory.iterdir()}
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = [int(name) for name in paths if name.isascii() and name.isdigit() and name[0] != "0"]
    # In an object store it has its name from the beginning.
    done = "commit_success.txt" if is_remote(directory) else ""
    return sorted(step for step in steps if (paths.get(str(step), directory) / done).exists())


def best_step(checkpoint: Any) -> int | None:
    """Which step was the best by validation accuracy when a checkpoint was saved.

    None where nothing had been evaluated on a validation split.

    Raises:
      WorkdirError: the file that says so is damaged.
    """
    damage = None if is_remote(checkpoint) else find_damage(checkpoint, POSITION)
    if damage:
        raise WorkdirError(damage)
    best = json.loads(inside(checkpoint, POSITION).read_bytes()).get("best")
    return best and best["step"]


def read_saved(directory: Any, step: int | str, read: Callable[[Any], T]) -> tuple[T, int]:
    """Reads a checkpoint whose checksums are right.

    A checkpoint that is removed while it is being read is no damage: then the choice is made anew.

    Args:
      directory: of the checkpoints of a run.
      step: "latest", "best", or a number; see `orthojax.load_classifier`.
      read: is called with the path of a checkpoint.

    Returns:
      What `read` returned, and the step.

    Raises:
      WorkdirError: there is none, or it is damaged.
    """
    if not is_remote(directory):
        directory = directory.absolute()  # as orbax demands
    if fault := name_fault(directory, NEVER):
        raise WorkdirError(fault)
    for _ in range(_ATTEMPTS):
        looked_at, damaged, out = None, True, ""
        try:
            steps = saved_steps(directory)
            if not steps:
                raise WorkdirError(f"there is no checkpoint in {directory}")
            wanted = step
            if step == "best":
                looked_at = steps[-1]  # if that is damaged
                wanted = best_step(directory / str(looked_at))
                looked_at = None
            looked_at = _chosen(directory, wanted, steps)
            checkpoint = directory / str(looked_at)
            if not is_remote(directory) and (damage := find_damage(checkpoint)):
                raise WorkdirError(damage)
            damaged = False
            return read(checkpoint), looked_at
        except Exception as error:  # orbax raises many, where files go that it reads
            if looked_at is None:
                raise
            checkpoint = directory / str(looked_at)
            before = _listing(checkpoint)
            time.sleep(_SECONDS)
            if before is None or _listing(checkpoint) != before:
                continue
            if damaged:
                others = [number for number in steps if number != looked_at]
                out = f"\nChoose one of {_numbers(others)}" if others else "\nThere is no other"
            raise WorkdirError(f"{checkpoint} cannot be read: {error}{out}") from error
    raise WorkdirError(
        f"the checkpoints in {directory} are removed faster than they can be read; name a step "
        "that stays, or try again when training has ended"
    )


def layout_differences(saved: Mapping[str, str], wanted: Mapping[str, str]) -> str:
    """Says in which leaves a checkpoint differs from a state, a line for each; empty in none.

    Args:
      saved: of the checkpoint, {path of a leaf: dtype and shape}.
      wanted: of the state.
    """
    lines = [
        f"{leaf}: {saved.get(leaf, 'absent')} in the checkpoint, {wanted.get(leaf, 'absent')} here"
        for leaf in {**saved, **wanted}
        if saved.get(leaf) != wanted.get(leaf)
    ]
    shown = lines[:5] + ([f"and {len(lines) - 5} more"] if len(lines) > 5 else [])
    return "".join(f"\n  {line}" for line in shown)


def _listing(checkpoint: Any) -> list[str] | None:
    """What is in a checkpoint; None where it has been removed."""
    if not checkpoint.exists():
        return None
    found = checkpoint.iterdir() if is_remote(checkpoint) else checkpoint.rglob("*")
    return sorted(map(str, found))


def _chosen(directory: Any, step: int | str | None, steps: list[int]) -> int:
    if step == "latest":
        return steps[-1]
    if str(step).isdecimal() and int(step) in steps:
        return int(step)
    found = f"there is no checkpoint of step {step!r} in {directory}"
    if step is None:
        found = (
            f"no checkpoint in {directory} is the best: this run has not been evaluated on a "
            "validation split, which another run gets by dataset.validation"
        )
    raise WorkdirError(f"{found}; choose latest or one of {_numbers(steps)}")


def _numbers(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
