"""A few steps of a modulated net on one or several processes: what each process runs."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from orthojax import modulate

DEPTH, WIDTH, BATCH = 6, 8, 32


def loss(kernels, sites, x):
    for kernel, site in zip(kernels, sites, strict=True):
        x = jnp.tanh(modulate(x @ kernel, site))
    return jnp.mean((x - 1) ** 2)


@jax.jit
def step(kernels, sites, x):
    grads, measured = jax.grad(loss, argnums=(0, 1))(kernels, sites, x)
    return kernels - 0.1 * grads, measured


def measure(devices, process=0, processes=1, images=BATCH):
    """Kernels and measurements after three steps on the first `images` rows of each batch."""
    rng = np.random.default_rng(0)
    kernels = rng.standard_normal((DEPTH, WIDTH, WIDTH)) * 10 ** rng.uniform(-1, 0.3, (DEPTH, 1, 1))
    batches = rng.standard_normal((3, BATCH, WIDTH)) * np.linspace(0.1, 2, BATCH)[:, None]
    mesh = Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*a)) for a in ((), ("data",)))
    sites = np.tile(np.float32([1e-4, 1e-3, 0]), (DEPTH, 1))
    kernels, sites = (
        jax.make_array_from_process_local_data(everywhere, array)
        for array in (kernels.astype(np.float32), sites)
    )
    for x in batches.astype(np.float32)[:, :images]:
        mine = jax.make_array_from_process_local_data(split, np.split(x, processes)[process])
        assert mine.shape == x.shape
        kernels, measured = step(kernels, sites, mine)
    assert measured.is_fully_replicated
    arrays = {"kernels": kernels, "measured": measured}
    return {name: np.asarray(array.addressable_data(0)) for name, array in arrays.items()}


if __name__ == "__main__":
    process, processes, port = map(int, sys.argv[1:4])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", processes, process)
    assert jax.device_count() == processes and jax.local_device_count() == 1
    np.savez(sys.argv[4], **measure(jax.devices(), process, processes))
