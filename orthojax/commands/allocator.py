"""Has the C library keep the memory that a training step frees, for programs that train on CPUs.

XLA:CPU allocates the temporaries of a step anew each time it runs. glibc gives so large pieces back
to the operating system at once, and each step then faults in all of its pages again.
"""

import argparse
import ctypes
import platform

# Parameters of mallopt(3), by the numbers of glibc's <malloc.h>.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_SETTINGS = (
    (_ARENA_MAX, 1),  # one heap: those of threads are mapped, and given back
    (_MMAP_MAX, 0),  # large pieces come from the heap too
    (_TRIM_THRESHOLD, 2**31 - 1),  # bytes free at its top before it shrinks
)


def add_keep_memory(parser: argparse.ArgumentParser) -> None:
    """Gives a program the flag `--keep_memory`, on by default."""
    parser.add_argument(
        "--keep_memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the memory that a step frees for the next one (CPUs, glibc)",
    )


def keep_freed_memory() -> bool:
    """Sets glibc's allocator to keep what is freed; call it before JAX runs anything.

    A setting of the whole process: for programs, never for a library to make. Where there is no
    glibc it does nothing.

    Returns:
      whether it is set.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return all(mallopt(parameter, value) for parameter, value in _SETTINGS)
