"""The summary of a run, which is written last: it says that the run has finished."""

import json
from typing import Any

from orthojax.console import tell
from orthojax.parallel.processes import is_first
from orthojax.storage.checksums import find_damage
from orthojax.storage.paths import is_remote
from orthojax.storage.saved import saved_steps
from orthojax.storage.workdir import seal, write_json_atomic

SUMMARY = "summary.json"


def read_finished(workdir: Any, steps: int, patience: int | None) -> dict[str, Any] | None:
    """The summary of the run in `workdir` if it has finished, else None.

    It has if it has taken all its steps, or if this same patience had ended it before.
    """
    try:
        summary = json.loads((workdir / SUMMARY).read_bytes())
        taken = summary["steps"]
        early = patience is not None and summary.get("stopped_by_patience") == patience
        finished = (taken == steps or early) and "test_accuracy" in summary
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    saved = saved_steps(workdir / "checkpoints")
    if not finished or find_damage(workdir, SUMMARY) or (saved and saved[-1] < taken):
        return None
    if saved and not is_remote(workdir) and find_damage(workdir / "checkpoints" / str(saved[-1])):
        return None  # trains again from an earlier checkpoint
    gone = "" if saved else "; its checkpoints are gone"
    if is_first():
        tell(f"{workdir} has finished its {taken:,} steps{gone}; to train anew choose another")
    return summary


def write_summary(workdir: Any, summary: dict[str, Any]) -> None:
    """Writes it, beside that of a run that was shorter, renamed to `summary-300.json`."""
    path = workdir / SUMMARY
    try:
        steps = int(json.loads(path.read_bytes())["steps"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        pass
    else:
        path.rename(path.with_name(f"summary-{steps}.json"))
    write_json_atomic(path, summary)
    seal(workdir, SUMMARY)
