"""The device mesh and where things lie on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from orthojax.errors import ConfigError


def make_mesh(data: int = -1) -> Mesh:
    """A mesh with one axis, `data`, over which batches are split.

    Args:
      data: number of devices; -1 takes all there are.

    Raises:
      ConfigError: there are fewer devices than asked for.

    Example:
      >>> make_mesh(data=1).shape["data"]
      1
    """
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    if not 1 <= count <= len(devices):
        raise ConfigError(
            f"mesh.data={data}, but there are {len(devices)} devices; take -1 for all of them"
        )
    return Mesh(np.asarray(devices[:count]), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    """The leading axis is split over `data`.

    Raises:
      ConfigError: the batch cannot be split evenly.
    """
    if batch_size % mesh.shape["data"]:
        raise ConfigError(
            f"batch_size={batch_size} cannot be split over {mesh.shape['data']} devices; choose a "
            "multiple of that, or fewer devices with mesh.data"
        )
    return NamedSharding(mesh, PartitionSpec("data"))
