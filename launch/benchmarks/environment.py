"""What measured figures depend on: the command, the commit, the machine, the versions."""

import pathlib
import platform
import subprocess
import sys


def environment() -> dict:
    """As a dictionary of strings and numbers."""
    import jax

    from orthojax.commands.command_line import program_name
    from orthojax.parallel.cores import usable_cores

    return {
        "command": " ".join([program_name(), *sys.argv[1:]]),
        **({"commit": found} if (found := commit()) else {}),
        "processor": processor(),
        "cores": usable_cores(),
        "device": jax.devices()[0].device_kind,
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def commit() -> str:
    """The commit of the checkout, `-dirty` where it is changed; empty where there is none."""
    root = pathlib.Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", root, "describe", "--always", "--dirty", "--exclude=*", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def processor() -> str:
    """The processor's name, where Linux tells it."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_bytes().decode(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
