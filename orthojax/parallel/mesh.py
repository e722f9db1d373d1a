"""The device mesh, and where things lie on it.

Two axes, and every device has a share of every batch. Along `data` the parameters are copies; along
`fsdp` each device keeps a part of the large ones and of what the optimizer holds for them; a step
gathers the kernels before it uses them, and updates each part where it lies (fully sharded data
parallelism; Rajbhandari et al. 2020, arXiv:1910.02054).
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from orthojax.errors import ConfigError
from orthojax.parallel.processes import available_devices

AXES = ("data", "fsdp")

# Below this many elements a kernel costs more to gather than its copies cost to keep.
FSDP_MIN_SIZE = 1024


def make_mesh(
    *, data: int = -1, fsdp: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes `data` and `fsdp`.

    Args:
      data: number of copies of the parameters; -1 takes all devices there are.
      fsdp: number of devices that share a copy.
      devices: what the mesh is made of; None is `jax.devices()`.

    Raises:
      ConfigError: there is no device, or fewer than asked for, or `fsdp` does not divide them; or
        some process of a multi-process run would be left without any.

    Example:
      >>> dict(make_mesh(data=1).shape)
      {'data': 1, 'fsdp': 1}
    """
    devices = list(available_devices() if devices is None else devices)
    total = len(devices)
    if fsdp < 1 or (data == -1 and total % fsdp):
        raise ConfigError(f"mesh.fsdp={fsdp} does not divide the {total} devices")
    copies = total // fsdp if data == -1 else data
    if not 1 <= copies * fsdp <= total:
        raise ConfigError(
            f"mesh.data={data} and mesh.fsdp={fsdp} need {copies * fsdp} devices, but there are "
            f"{total}; take mesh.data=-1 for all of them"
        )
    chosen = devices[: copies * fsdp]
    if {d.process_index for d in chosen} != {d.process_index for d in devices}:
        raise ConfigError(
            f"mesh.data={data} and mesh.fsdp={fsdp} leave processes without a device; take "
            "mesh.data=-1, or start fewer processes"
        )
    # Whole machines are laid out along their interconnect.
    return jax.make_mesh(
        (copies, fsdp), AXES, axis_types=(AxisType.Auto, AxisType.Auto), devices=chosen
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, batch_size: int, key: str = "batch_size") -> NamedSharding:
    """The leading axis is split over all devices.

    Args:
      mesh: from `make_mesh`.
      batch_size: rows of the axis.
      key: what the config calls them, for the message.

    Raises:
      ConfigError: the batch cannot be split evenly.
    """
    if batch_size % mesh.size:
        raise ConfigError(
            f"{key}={batch_size} cannot be split over {mesh.size} devices; choose a "
            "multiple of that, or fewer devices with mesh.data"
        )
    return NamedSharding(mesh, PartitionSpec(AXES))


def state_shardings(state: Any, mesh: Mesh) -> Any:
    """Where each array of a train state lies.

    Kernels of at least `FSDP_MIN_SIZE` elements, and what an optimizer keeps of the same name and
    shape, are split over `fsdp`: along the inputs, so that a Gram product of columns is a sum over
    devices and no kernel has to be gathered for it; along the outputs where it does not divide
    the inputs. A leading axis of layers is never split: a scan takes one layer after the other.
    Everything else is replicated.

    Args:
      state: a pytree of arrays or of `jax.ShapeDtypeStruct`.
      mesh: from `make_mesh`.

    Returns:
      A tree of `NamedSharding` of the same structure.

    Example:
      >>> kernel = {"kernel": jax.ShapeDtypeStruct((3, 3, 16, 32), "float32")}
      >>> tuple(state_shardings(kernel, make_mesh(data=1, fsdp=2))["kernel"].spec)
      (None, None, 'fsdp', None)
    """
    fsdp = mesh.shape["fsdp"]

    def place(path, leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        spec: list[str | None] = [None] * leaf.ndim
        axes = [a for a in (-2, -1) if leaf.ndim >= 2 and leaf.shape[a] % fsdp == 0]
        if fsdp > 1 and name == "kernel" and leaf.size >= FSDP_MIN_SIZE and axes:
            spec[axes[0]] = "fsdp"
            return NamedSharding(mesh, PartitionSpec(*spec))
        return replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, state)


def local_rows(sharding: NamedSharding, batch_size: int) -> np.ndarray:
    """Which rows of a batch this process supplies, in ascending order: int64 (rows,).

    Example:
      >>> local_rows(batch_sharding(make_mesh(data=1), 4), 4).tolist()
      [0, 1, 2, 3]
    """
    indices = sharding.addressable_devices_indices_map((batch_size,)).values()
    slices = {index[0].indices(batch_size) for index in indices}
    return np.concatenate([np.arange(*bounds) for bounds in sorted(slices)])


def to_devices(sharding: NamedSharding, batch_size: int, rows: np.ndarray, batch: Any) -> Any:
    """Puts this process's rows of a batch where they belong in the global batch.

    Args:
      sharding: from `batch_sharding`.
      batch_size: rows of the global batch.
      rows: from `local_rows`.
      batch: pytree of host arrays, of as many rows as `rows` has.

    Returns:
      The same tree of global `jax.Array`, whose leading axis is the whole batch's.
    """
    if jax.process_count() == 1:
        return jax.device_put(batch, sharding)
    # Not contiguous in general: meshes follow the interconnect, not the numbers of the hosts.
    position = {row: place for place, row in enumerate(rows.tolist())}

    def put(array):
        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            return array[position[start] : position[start] + stop - start]

        shape = (batch_size, *array.shape[1:])
        return jax.make_array_from_callback(shape, sharding, shard)

    return jax.tree.map(put, batch)
