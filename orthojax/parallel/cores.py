"""How many cores this process may use."""

import os


def usable_cores() -> int:
    """The cores this process may run on; all of the machine's where the platform has no affinity.

    macOS and Windows lack `os.sched_getaffinity`.

    Example:
      >>> usable_cores() >= 1
      True
    """
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
