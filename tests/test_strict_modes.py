"""The library under every strict mode of JAX."""

import os
import pathlib
import subprocess
import sys

import pytest

TESTS = pathlib.Path(__file__).parent
MODES = {
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DEBUG_NANS": "true",
    "JAX_ENABLE_X64": "true",
    "JAX_ENABLE_CHECKS": "true",
    "JAX_CHECK_TRACER_LEAKS": "true",
}


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_training_steps_run(mode):
    """Every transformation, layer and initializer, in a process of that mode."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", "strict_steps.py"],
        cwd=TESTS,
        env={**os.environ, mode: MODES[mode]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
