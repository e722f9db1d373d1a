"""A working directory belongs to one config, and to one training process at a time."""

import contextlib
import datetime
import errno
import importlib.metadata
import json
import os
import pathlib
import platform
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from orthojax.config.sections import differences, to_json
from orthojax.console import tell
from orthojax.errors import UserError, WorkdirBusyError, WorkdirError, is_permanent
from orthojax.storage.checksums import CHECKSUMS, find_damage, write_checksums
from orthojax.storage.paths import (
    TEMPORARY,
    foreign,
    inside,
    is_remote,
    name_fault,
    set_aside,
    write_atomic,
)
from orthojax.storage.saved import saved_steps

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

_PACKAGES = (
    *("orthojax", "jax", "jaxlib", "flax", "optax"),
    *("orbax-checkpoint", "tensorflow-datasets", "numpy"),
)
CONFIG = "config.json"
_SEALED = (CONFIG, "summary.json")  # what `checksums.json` of a run covers
# Beginnings of the keys that training does not depend on: where it takes place, what it reads and
# how fast, how it is evaluated, and what is written meanwhile.
_WITHOUT_EFFECT = (
    *("mesh.", "dataset.data_dir:", "dataset.cache_dir:", "dataset.workers:", "dataset.threads:"),
    *(
        "log_every:",
        "eval_every:",
        "checkpoint_every:",
        "observe_every:",
        "keep_checkpoints:",
        "recalibrate_bn:",
    ),
    "tensorboard:",
)
_LENGTH = ("steps:", "patience:")  # when training ends
_LAST_BITS = ("packages.jaxlib:", "backend:", "device_kind:", "device_count:")
# What Lustre without flock, NFS without a lock daemon, and others answer.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)
_OF_WRITING = (errno.EROFS, errno.EFBIG, errno.EIO)  # said of an open file, without its name
_held_locks: dict[tuple[int, int], int] = {}  # descriptors by device and inode
_claimed: dict[str, tuple[int, int]] = {}  # device and inode of the lock, by directory
_ATTEMPTS, _SECONDS = 5, 0.1  # of a reader, while a start of the run writes its files anew


def claim(workdir: Any, config: Mapping, check: Callable[[], None] = lambda: None) -> None:
    """Makes `workdir` this run's own until the process ends, or says why it cannot be.

    A new or empty directory receives `config.json` (the resolved config) and `environment.json`
    (a list with one entry for each start of the run: versions, devices, seed, command line).
    Where `config.json` holds an equal config the run is being resumed. What the results do not
    depend on may differ (the section `mesh`, where and by how many workers the data is read, how
    often something is recorded or saved), and so may `steps` and `patience`: then the run goes on,
    and is longer.
    The directory is locked as long as the process lives; the operating system frees the lock even
    after `kill -9`. (In an object store there are no locks: there, starting one run at a time is
    the user's part. So it is on a file system without `flock`, which is reported on stderr.)
    Of several JAX processes the first one alone may call this.

    Args:
      workdir: from `orthojax.storage.paths.to_path`, as in all of this module.
      config: the resolved config, a Mapping or an ml_collections ConfigDict.
      check: is called once the directory is locked and its config agrees, before anything is
        written; what it raises leaves the directory as it was.

    Raises:
      WorkdirError: the path is a file or cannot be written, the directory holds the run of
        another config, or one that is beyond `steps` already, or no run at all; a
        `WorkdirBusyError` if another process trains there.

    Example:
      >>> import tempfile
      >>> workdir = pathlib.Path(tempfile.mkdtemp(), "run")
      >>> claim(workdir, {"seed": 0, "optimizer": {"learning_rate": 0.1}})
      >>> sorted(path.name for path in workdir.iterdir())
      ['config.json', 'environment.json', 'lock']
    """
    config = to_json(config)
    _open_directory(workdir)
    if fault := foreign(workdir):
        raise WorkdirError(f"{fault}; put a file in its place, or choose another --workdir")
    if not is_remote(workdir):
        _lock(workdir)
    if (workdir / CONFIG).exists():
        saved = _read_json(workdir / CONFIG)
        _refuse(workdir, _changes(saved, config, (*_WITHOUT_EFFECT, *_LENGTH)))
        _check_length(workdir, saved, config)
    else:
        saved = None
    check()
    if config != saved:
        write_json_atomic(workdir / CONFIG, config)
    starts = workdir / "environment.json"
    write_json_atomic(starts, [*_earlier_starts(starts), _environment(config)])


def may_differ(key: str) -> bool:
    """Whether a run may go on with another value of a key of its config, or of a whole section.

    Example:
      >>> [may_differ(key) for key in ("mesh.fsdp", "mesh", "patience", "seed", "dataset")]
      [True, True, True, False, False]
    """
    return any(f"{key}{end}".startswith((*_WITHOUT_EFFECT, *_LENGTH)) for end in ":.")


def note_start(workdir: Any, **facts: Any) -> list[str]:
    """Adds facts to what `environment.json` says of the last start.

    Returns:
      In what the start differs from the last one that has noted the same facts, of what the last
      bits of a result depend on: a line for each fact, for the version of jaxlib and the devices.

    Example:
      >>> import tempfile
      >>> workdir = pathlib.Path(tempfile.mkdtemp(), "run")
      >>> for convolution in ("native 0a1b", "XLA"):
      ...     claim(workdir, {"seed": 0})
      ...     told = note_start(workdir, convolution=convolution)
      >>> told
      ["convolution: 'native 0a1b' -> 'XLA'"]
    """
    path = workdir / "environment.json"
    *before, start = json.loads(path.read_bytes())
    start |= facts
    write_json_atomic(path, [*before, start])
    noted = [
        earlier for earlier in before if isinstance(earlier, dict) and facts.keys() <= {*earlier}
    ]
    if not noted:
        return []
    watched = (*(f"{name}:" for name in facts), *_LAST_BITS)
    return [line for line in differences(noted[-1], start) if line.startswith(watched)]


def check_workdir(workdir: Any) -> None:
    """Finds out, before the work and making nothing, whether `claim` could make the directory.

    Raises:
      WorkdirError: its name, or what it lies in, is no place for a run.
    """
    if fault := name_fault(workdir):
        raise WorkdirError(f"--workdir: {fault}")
    if is_remote(workdir):
        return
    try:
        for place in (workdir, *workdir.absolute().parents):
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISDIR(place.stat().st_mode):
                    raise NotADirectoryError(errno.ENOTDIR, "", str(place))
                if not os.access(place, os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))
                return
    except NotADirectoryError:
        raise WorkdirError(
            f"{workdir} is a file or lies below one; choose another --workdir"
        ) from None
    except (OSError, ValueError) as error:
        raise WorkdirError(f"{error}; choose a --workdir that you can write to") from None


def check_config(workdir: Any, config: Mapping) -> None:
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
    saved = workdir / CONFIG
    if not saved.exists():
        raise WorkdirError(f"{workdir} holds no run (there is no {CONFIG} in it)")
    _refuse(workdir, _changes(_read_json(saved), to_json(config), _WITHOUT_EFFECT))


def seal(workdir: Any, *written: str) -> None:
    """Keeps the checksums of what `read_run_file` reads, in `checksums.json`.

    Args:
      workdir: of the run.
      *written: names of files that are as they should be. Of the others those are covered that
        have been, and are as they were.
    """
    first = not (workdir / CHECKSUMS).exists()
    others = [name for name in _SEALED if first or not find_damage(workdir, name)]
    write_checksums(workdir, [name for name in _SEALED if name in written or name in others])


def read_run_file(workdir: Any, name: str) -> dict[str, Any]:
    """Reads a file of a run, whose checksum is right if it has one; the run may be training.

    Args:
      workdir: of the run.
      name: `config.json` or `summary.json`; or another section of keys and values.

    Raises:
      WorkdirError: there is no run, or the file is missing or damaged.
    """
    for _ in range(_ATTEMPTS):
        try:
            value = json.loads(inside(workdir, name).read_bytes())
            # A run from before there were any is read as it is.
            sealed = name in _SEALED and (workdir / CHECKSUMS).exists()
            damage = find_damage(workdir, name) if sealed else None
            if damage is None and not isinstance(value, dict):
                damage = f"{name} is damaged: it is no section of keys and values"
        except (OSError, ValueError, RecursionError, WorkdirError) as error:
            damage = f"{name} is damaged: {error}"
        if damage is None:
            return value
        if not (workdir / CONFIG).exists():
            raise WorkdirError(f"{workdir} holds no run (there is no {CONFIG} in it)")
        if not (workdir / name).exists():
            raise WorkdirError(
                f"{workdir} was trained before {name} was kept; start its training command once "
                "more, which writes it and trains no further"
            )
        time.sleep(_SECONDS)
    raise WorkdirError(
        f"{workdir}: {damage}\nStart its training command once more, which compares {name} or "
        "writes it anew, or take another copy of the run"
    )


def check_owned(workdir: Any) -> None:
    """Says if `workdir` is no longer the directory that this process has claimed, if it has.

    Raises:
      WorkdirError: it has been removed, or another one is in its place.
    """
    claimed = _claimed.get(os.path.abspath(workdir))
    try:
        status = os.stat(workdir / "lock") if claimed else None
        if status is None or (status.st_dev, status.st_ino) == claimed:
            return
    except (FileNotFoundError, NotADirectoryError):
        pass
    raise WorkdirError(
        f"{workdir} was removed while it was trained, or another run has taken its place: training "
        "stops, and what was removed is lost. Remove what is left of it, or choose another "
        "--workdir, to begin anew"
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


@contextlib.contextmanager
def failures_explained(workdir: Any) -> Iterator[None]:
    """Turns what the file system refuses while a run is trained into a `WorkdirError`.

    What another start may mend, such as a server that does not answer, stays an `OSError`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        check_owned(workdir)  # else whatever was raised comes of that
        if not (isinstance(error, OSError) and is_permanent(error)):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        below = os.path.abspath(str(error.filename)).startswith(os.path.abspath(workdir))
        if not (below or full or error.filename is None and error.errno in _OF_WRITING):
            raise
        out = "make room, and run" if full else "mend that, or choose another --workdir, and run"
        raise WorkdirError(
            f"{workdir} cannot be written: {error}\nWhat was saved stays; {out} the same command "
            "again to go on from there"
        ) from error


def _changes(saved: Any, config: Mapping, may_differ: tuple[str, ...]) -> list[str]:
    return [line for line in differences(saved, config) if not line.startswith(may_differ)]


def _refuse(workdir: Any, changes: list[str]) -> None:
    if changes:
        raise WorkdirError(
            f"{workdir} holds a run of another config (there -> here):\n  "
            + "\n  ".join(changes)
            + "\nChoose another --workdir, or run with the config that is there."
        )


def _check_length(workdir: Any, saved: Mapping, config: Mapping) -> None:
    before, after = saved.get("steps"), config.get("steps")
    if before == after:
        return
    trained = max(saved_steps(workdir / "checkpoints"), default=0)
    if after < trained:
        raise WorkdirError(
            f"{workdir} holds a run of step {trained}, and steps={after} is less; take more, or "
            "choose another --workdir"
        )
    tell(
        f"{workdir}: steps={before} before, {after} now; a schedule that depends on the length of "
        "the run is from here on that of the new length"
    )


def _earlier_starts(path: Any) -> list[Any]:
    if not path.exists():
        return []
    with contextlib.suppress(ValueError):
        starts = json.loads(path.read_bytes())
        if isinstance(starts, list):
            return starts
    tell(f"{path} is damaged; it is kept as {set_aside(path)}")
    return []


def _open_directory(workdir: Any) -> None:
    check_workdir(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # An object store has no empty directories.
        names = {entry.name for entry in workdir.iterdir()} if workdir.exists() else set()
    except OSError as error:
        raise WorkdirError(f"{error}; choose a --workdir that you can write to") from None
    # A process that is killed inside `claim` leaves these before config.json exists.
    begun = {name for name in names if name == "lock" or name.endswith(TEMPORARY)}
    if CONFIG not in names and names - begun:
        raise WorkdirError(
            f"{workdir} is not empty and holds no run (there is no {CONFIG} in it); choose a new "
            "or empty --workdir"
        )


def _lock(workdir: pathlib.Path) -> None:
    try:
        descriptor = os.open(workdir / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise WorkdirError(f"{error}; choose a --workdir that you can write to") from None
    status = os.fstat(descriptor)
    identity = (status.st_dev, status.st_ino)
    if identity in _held_locks:
        os.close(descriptor)
        return
    try:
        if fcntl is None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise WorkdirBusyError(
            f"another process is training in {workdir}; wait for it, or choose another --workdir"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        tell(
            f"{workdir} cannot be locked ({error.strerror}): make sure that no other process "
            "trains there"
        )
    _held_locks[identity] = descriptor
    _claimed[os.path.abspath(workdir)] = identity


def _drop_inherited_locks() -> None:
    for descriptor in _held_locks.values():
        os.close(descriptor)
    _held_locks.clear()


# A forked data worker that outlives its killed parent must not keep the directory locked.
if hasattr(os, "register_at_fork"):  # Windows forks no processes
    os.register_at_fork(after_in_child=_drop_inherited_locks)


def _read_json(path: Any) -> Any:
    try:
        value = json.loads(path.read_bytes())
        if isinstance(value, dict):
            return value
        error = "it is no section of keys and values"
    except (OSError, ValueError) as failure:
        error = failure
    raise WorkdirError(f"{path} is damaged ({error}); choose another --workdir")


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
