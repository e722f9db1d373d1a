"""Two processes, each with half of the batch, measure the moments of the whole."""

import os
import pathlib
import re
import socket
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[2]
# One device for each process.
XLA_FLAGS = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])

# Run by every process; with one process it needs no peers. `share`: halves of the batches used.
SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

process, processes, share, port = map(int, sys.argv[1:5])
path = sys.argv[5]
if processes > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process)
assert jax.device_count() == processes and jax.local_device_count() == 1

from orthojax import init_site, modulate

DEPTH, WIDTH, BATCH = 6, 8, 32
rng = np.random.default_rng(0)
kernels = rng.standard_normal((DEPTH, WIDTH, WIDTH)) * 10 ** rng.uniform(-1, 0.3, (DEPTH, 1, 1))
batches = rng.standard_normal((3, BATCH, WIDTH)) * np.linspace(0.1, 2, BATCH)[:, None]

def loss(kernels, sites, x):
    for kernel, site in zip(kernels, sites):
        x = jnp.tanh(modulate(x @ kernel, site))
    return jnp.mean((x - 1) ** 2)

@jax.jit
def step(kernels, sites, x):
    grads, measured = jax.grad(loss, argnums=(0, 1))(kernels, sites, x)
    return kernels - 0.1 * grads, measured

mesh = Mesh(np.asarray(jax.devices()), ("data",), axis_types=(AxisType.Auto,))
everywhere, split = (NamedSharding(mesh, PartitionSpec(*a)) for a in ((), ("data",)))
put = lambda array: jax.make_array_from_process_local_data(everywhere, array)
sites = put(np.tile(np.float32([1e-4, 1e-3, 0]), (DEPTH, 1)))
kernels = put(kernels.astype(np.float32))
batches = batches.astype(np.float32)[:, :BATCH * share // 2]
for x in batches:
    mine = np.split(x, processes)[process]
    x = jax.make_array_from_process_local_data(split, mine)
    assert x.shape == batches[0].shape
    kernels, measured = step(kernels, sites, x)
assert measured.is_fully_replicated
arrays = {"kernels": kernels, "measured": measured}
local = {name: array.addressable_data(0) for name, array in arrays.items()}
np.savez(path + f"-{process}.npz", **local)
"""


def run(path, *, processes, share=2):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "XLA_FLAGS": XLA_FLAGS, "PYTHONPATH": str(ROOT)}
    running = []
    try:
        for process in range(processes):
            arguments = map(str, (process, processes, share, port, path))
            command = [sys.executable, "-c", SCRIPT, *arguments]
            running.append(
                subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            )
        errors = [process.communicate(timeout=120)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, error in zip(running, errors, strict=True):
        assert process.returncode == 0, error
    return [dict(np.load(f"{path}-{process}.npz")) for process in range(processes)]


def test_two_processes_measure_the_moments_of_the_joint_batch(tmp_path):
    [alone] = run(tmp_path / "alone", processes=1)
    [half] = run(tmp_path / "half", processes=1, share=1)
    pair = run(tmp_path / "pair", processes=2)
    for name, expected in alone.items():
        np.testing.assert_array_equal(pair[0][name], pair[1][name])
        np.testing.assert_allclose(pair[0][name], expected, rtol=1e-4, atol=1e-7)
    # The comparison can tell: half of the batch has other moments.
    assert not np.allclose(half["measured"][:, 0], alone["measured"][:, 0], rtol=0.1)
