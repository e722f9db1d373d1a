"""TPU slices by name: their chips, shapes and links, as the vendor publishes them.

Nothing here needs a TPU, and nothing but `Topology.devices` imports JAX.
"""

import dataclasses
import difflib
import math
import os
from typing import Any

from orthojax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one chip of a TPU generation.

    Attributes:
      name: v4, v5e, v5p or v6e.
      flops: peak bf16 operations per second.
      hbm_bytes: capacity of its memory.
      hbm_bandwidth: bytes per second between memory and chip.
      link_bandwidth: bytes per second of one interconnect (ICI) link, in one direction.
      source: where the vendor says so.
    """

    name: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    source: str


_DOCS = "https://docs.cloud.google.com/tpu/docs/"

# Links: what the pages call bidirectional bandwidth of a chip, by 2 directions and by 4 ports (6 in
# a 3-D torus). That of v4 is not published by chip; there it is the "all-reduce bandwidth per Pod",
# 1.1 PB/s by 4,096 chips and 6 ports, which for v5e and v6e gives just what their ports do.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 275e12, 32 * 2**30, 1200e9, 1.1e15 / 4096 / 6, _DOCS + "v4"),
        Chip("v5e", 197e12, 16e9, 819e9, 400e9 / 2 / 4, _DOCS + "v5e"),
        Chip("v5p", 459e12, 95 * 2**30, 2765e9, 1200e9 / 2 / 6, _DOCS + "v5p"),
        Chip("v6e", 918e12, 32e9, 1638e9, 800e9 / 2 / 4, _DOCS + "v6e"),
    )
}

# Chips -> shape: the pages' lists of configurations, of those the ones nearest to a square or cube.
_PLANES = {8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
_BOXES = {8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4), 64: (4, 4, 4), 128: (4, 4, 8), 256: (4, 8, 8)}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One slice of a pod.

    Attributes:
      name: accelerator type, such as `v5e-16`.
      chip: what it is made of.
      shape: chips along each axis.
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many chips there are, each of them one JAX device."""
        return math.prod(self.shape)

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Which axes are closed to a ring.

        A 2-D pod's are where they span all 16 of it; a 3-D slice's where it is made of whole cubes
        of 4×4×4 (https://jax-ml.github.io/scaling-book/tpus, "TPU networking").
        """
        if len(self.shape) == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * 3

    @property
    def ici_bandwidth(self) -> float:
        """Bytes per second that a chip can send in a collective over the whole slice.

        A ring uses both links of an axis. On an axis that is not closed the chips at the ends have
        one link each, and a ring along it goes there and back: half as much.
        """
        links = sum(2 if ring else 1 for ring in self.wrap)
        return links * self.chip.link_bandwidth

    def devices(self) -> list[Any]:
        """The slice's devices, for compiling only: list of `jax.Device`.

        Raises:
          ConfigError: the TPU compiler is not installed.
        """
        try:
            import libtpu  # noqa: F401
        except ImportError:
            raise ConfigError(
                "compiling for a TPU needs its compiler: pip install -e '.[tpu]'"
            ) from None
        # Read by the compiler when it is loaded, which is now; else it would look for a TPU.
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        os.environ["TPU_WORKER_HOSTNAMES"] = "localhost"
        os.environ["TPU_ACCELERATOR_TYPE"] = self.name.replace("v5e", "v5litepod")
        from jax.experimental import topologies

        planar = len(self.shape) == 2
        described = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{self.chip.name.replace('v5p', 'v5')}:{'x'.join(map(str, self.shape))}",
            # "megacore": a chip's two cores are one device.
            chip_config_name="default" if planar else "megacore",
            chips_per_host_bounds=(2, 2, 1),
            num_slices=1,
            wrap=(*self.wrap, False)[:3],
        )
        return list(described.devices)


def _slices() -> list[Topology]:
    # Accelerator types of v4 and v5p count the cores, of which a chip has two.
    planes = [Topology(f"{c}-{n}", CHIPS[c], s) for c in ("v5e", "v6e") for n, s in _PLANES.items()]
    boxes = [
        Topology(f"{c}-{2 * n}", CHIPS[c], s) for c in ("v4", "v5p") for n, s in _BOXES.items()
    ]
    return sorted(planes + boxes, key=lambda topology: (topology.chip.name, topology.chips))


TOPOLOGIES = {topology.name: topology for topology in _slices()}


def find_topology(name: str) -> Topology:
    """The slice of that name.

    Names are accelerator types: v5e-8 to v5e-256 and v6e-8 to v6e-256, where the number counts
    chips, and v4-16 to v4-512 and v5p-16 to v5p-512, where it counts cores, two to a chip.

    Raises:
      ConfigError: there is none; the message has the nearest.

    Example:
      >>> find_topology("v5p-128").shape, find_topology("v5p-128").chips
      ((4, 4, 4), 64)
    """
    if name in TOPOLOGIES:
        return TOPOLOGIES[name]
    nearest = difflib.get_close_matches(name, TOPOLOGIES, n=3, cutoff=0.0)
    raise ConfigError(
        f"unknown topology `{name}`; nearest: {', '.join(nearest)}. "
        f"Known are {', '.join(TOPOLOGIES)}"
    )
