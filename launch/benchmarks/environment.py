"""What measured figures depend on: the command, the machine, the versions."""

import pathlib
import platform
import sys


def environment() -> dict:
    """As a dictionary of strings and numbers."""
    import jax

    from orthojax.commands.command_line import program_name
    from orthojax.parallel.cores import usable_cores

    return {
        "command": " ".join([program_name(), *sys.argv[1:]]),
        "processor": processor(),
        "cores": usable_cores(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_bytes().decode(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
