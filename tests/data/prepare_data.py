"""`launch/prepare_data.py` as a user calls it."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def prepare_data(*arguments: str, timeout: float) -> subprocess.CompletedProcess:
    """Runs it, in a process of its own, until it has succeeded."""
    done = subprocess.run(
        [sys.executable, "launch/prepare_data.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done
