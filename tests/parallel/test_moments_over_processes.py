"""Two processes, each with half of the batch, measure the moments of the whole."""

import subprocess
import sys

import jax
import numpy as np

from tests.parallel import moments_program
from tests.parallel.own_processes import ENVIRONMENT
from tests.parallel.test_rendezvous import free_port


def run_pair(folder):
    port, running = free_port(), []
    places = [folder / f"{process}.npz" for process in range(2)]
    try:
        for process, path in enumerate(places):
            arguments = map(str, (moments_program.__file__, process, 2, port, path))
            running.append(
                subprocess.Popen(
                    [sys.executable, *arguments], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
                )
            )
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, error in zip(running, errors, strict=True):
        assert process.returncode == 0, error
    return [dict(np.load(path)) for path in places]


def test_two_processes_measure_the_moments_of_the_joint_batch(tmp_path):
    alone, half = (moments_program.measure(jax.devices()[:1], images=images) for images in (32, 16))
    pair = run_pair(tmp_path)
    for name, expected in alone.items():
        np.testing.assert_array_equal(pair[0][name], pair[1][name])
        np.testing.assert_allclose(pair[0][name], expected, rtol=1e-4, atol=1e-16)
    # The comparison can tell: half of the batch has other moments.
    assert not np.allclose(half["measured"][:, 0], alone["measured"][:, 0], rtol=0.1, atol=0)
