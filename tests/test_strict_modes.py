"""The library under every strict mode of JAX: its public functions, on good and bad arguments."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
MODES = {
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_DEBUG_NANS": "true",
    "JAX_ENABLE_X64": "true",
    "JAX_ENABLE_CHECKS": "true",
    "JAX_CHECK_TRACER_LEAKS": "true",
}
LIBRARY = ("sites", "modulator", "linen", "initializers", "isometry", "matrices", "describe")


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_examples_and_training_steps_run(mode):
    """Every example of a docstring, and the steps below, in a process of that mode."""
    files = [*(f"orthojax/{name}.py" for name in LIBRARY), "orthojax/ortho", "orthojax/models"]
    command = [sys.executable, "-m", "pytest", "-n", "0", "-q", "-p", "no:cacheprovider"]
    if mode == "JAX_NUMPY_DTYPE_PROMOTION":  # optax's Adam does not run there
        command += [
            "--deselect",
            "orthojax/ortho/transformation.py::orthojax.ortho.transformation.decoupled_ortho",
        ]
    done = subprocess.run(
        [*command, *files, "tests/strict_steps.py"],
        cwd=ROOT,
        env={**os.environ, mode: MODES[mode]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
