"""A working directory belongs to one config, and to one training process at a time."""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from collections.abc import Mapping
from typing import Any

import jax

from orthojax.config import differences, to_json
from orthojax.errors import WorkdirBusyError, WorkdirError
from orthojax.storage import is_remote, to_path, write_atomic

_PACKAGES = (
    *("orthojax", "jax", "jaxlib", "flax", "optax"),
    *("orbax-checkpoint", "tensorflow-datasets", "numpy"),
)
CONFIG = "config.json"
# Beginnings of the keys that no result depends on.
_WITHOUT_EFFECT = ("mesh.", "dataset.data_dir:", "dataset.workers:")
# What a process killed inside `claim` may leave behind before config.json exists.
_BEGINNINGS = {"lock", ".config.json.tmp"}
_held_locks: dict[tuple[int, int], int] = {}


def claim(workdir: str | os.PathLike, config: Mapping) -> None:
    """Makes `workdir` this run's own until the process ends, or says why it cannot be.

    A new or empty directory receives `config.json` (the resolved config) and `environment.json`
    (a list with one entry for each start of the run: versions, devices, seed, command line).
    Where `config.json` holds an equal config the run is being resumed; the section `mesh` and
    where and by how many workers the data is read may differ, because the results do not depend
    on them. The directory is locked as long as the process
    lives; the operating system frees the lock even after `kill -9`. (In an object store there are
    no locks: there, starting one run at a time is the user's part.)
    Of several JAX processes the first one alone may call this.

    Args:
      workdir: a path on a local or shared file system, or `gs://…`.
      config: the resolved config, a Mapping or an ml_collections ConfigDict.

    Raises:
      WorkdirError: the path is a file or cannot be written, the directory holds the run of
        another config or no run at all; a `WorkdirBusyError` if another process trains there.

    Example:
      >>> import tempfile
      >>> workdir = pathlib.Path(tempfile.mkdtemp(), "run")
      >>> claim(workdir, {"seed": 0, "optimizer": {"learning_rate": 0.1}})
      >>> sorted(path.name for path in workdir.iterdir())
      ['config.json', 'environment.json', 'lock']
    """
    workdir, config = to_path(workdir), to_json(config)
    _open_directory(workdir)
    if not is_remote(workdir):
        _lock(workdir)
    if (workdir / CONFIG).exists():
        check_config(workdir, config)
    else:
        write_json_atomic(workdir / CONFIG, config)
    saved_environment = workdir / "environment.json"
    starts = _read_json(saved_environment) if saved_environment.exists() else []
    write_json_atomic(saved_environment, [*starts, _environment(config)])


def check_config(workdir: str | os.PathLike, config: Mapping) -> None:
    """Compares the config of the run in `workdir` with another; see `claim` for what may differ.

    Raises:
      WorkdirError: they differ, or there is no run; the message names every key that does.

    Example:
      >>> import tempfile
      >>> workdir = pathlib.Path(tempfile.mkdtemp(), "run")
      >>> claim(workdir, {"seed": 0, "mesh": {"data": 1}})
      >>> check_config(workdir, {"seed": 0, "mesh": {"data": 2}})
      >>> check_config(workdir, {"seed": 1})
      Traceback (most recent call last):
      ...
      orthojax.errors.WorkdirError: ...: 0 -> 1...
    """
    saved = to_path(workdir) / CONFIG
    if not saved.exists():
        raise WorkdirError(f"{workdir} holds no run (there is no {CONFIG} in it)")
    changes = [
        line
        for line in differences(_read_json(saved), to_json(config))
        if not line.startswith(_WITHOUT_EFFECT)
    ]
    if changes:
        raise WorkdirError(
            f"{workdir} holds a run of another config (there -> here):\n  "
            + "\n  ".join(changes)
            + "\nChoose another --workdir, or run with the config that is there."
        )


def write_json_atomic(path: str | os.PathLike, value: Any) -> None:
    """Writes sorted, indented JSON that is there as a whole or not at all.

    Raises:
      ValueError: the value holds NaN or Inf, which JSON does not have.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "summary.json")
      >>> write_json_atomic(path, {"steps": 150})
      >>> path.read_text()
      '{\\n  "steps": 150\\n}\\n'
    """
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomic(path, text.encode())


def _open_directory(workdir: Any) -> None:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # An object store has no empty directories.
        names = {entry.name for entry in workdir.iterdir()} if workdir.exists() else set()
    except (FileExistsError, NotADirectoryError):
        raise WorkdirError(
            f"{workdir} is a file or lies below one; choose another --workdir"
        ) from None
    except PermissionError as error:
        raise WorkdirError(f"{error}; choose a --workdir that you can write to") from None
    if CONFIG not in names and names - _BEGINNINGS:
        raise WorkdirError(
            f"{workdir} is not empty and holds no run (there is no config.json in it); choose a "
            "new or empty --workdir"
        )


def _lock(workdir: pathlib.Path) -> None:
    try:
        descriptor = os.open(workdir / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError as error:
        raise WorkdirError(f"{error}; choose a --workdir that you can write to") from None
    status = os.fstat(descriptor)
    identity = (status.st_dev, status.st_ino)
    if identity in _held_locks:
        os.close(descriptor)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise WorkdirBusyError(
            f"another process is training in {workdir}; wait for it, or choose another --workdir"
        ) from None
    _held_locks[identity] = descriptor


def _drop_inherited_locks() -> None:
    for descriptor in _held_locks.values():
        os.close(descriptor)
    _held_locks.clear()


# A forked data worker that outlives its killed parent must not keep the directory locked.
os.register_at_fork(after_in_child=_drop_inherited_locks)


def _read_json(path: Any) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise WorkdirError(f"{path} is damaged ({error}); choose another --workdir") from None


def _environment(config: Mapping) -> dict[str, Any]:
    versions = {}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "backend": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "process_count": jax.process_count(),
        "mesh": config.get("mesh"),
        "seed": config.get("seed"),
        "command": sys.argv,
    }
