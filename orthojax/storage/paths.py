"""Paths on this machine and in object stores (`gs://…`), where nothing is ever half written.

An object store has no appending, no renaming and no locks, but an object appears as a whole or not
at all. So the differences are few, and they are all here.
"""

import importlib.util
import os
import pathlib
from typing import Any

from orthojax.caches import expand
from orthojax.errors import WorkdirError


def to_path(path: str | os.PathLike) -> Any:
    """A `pathlib.Path`, or for `gs://…` an `etils.epath.Path`, which behaves like one.

    A leading `~` is the home directory: a shell hands on `--workdir=~/runs` as it is.

    Raises:
      WorkdirError: an object store is named and the extra `[gcs]` is not installed.

    Example:
      >>> to_path("runs/digits").name
      'digits'
    """
    text = os.fspath(path)
    if "://" not in text:
        return pathlib.Path(expand(text))
    if not text.startswith("gs://"):
        raise WorkdirError(f"{text}: only gs:// and this machine's own paths can be used")
    if importlib.util.find_spec("gcsfs") is None:
        raise WorkdirError(f"{text} needs the extra [gcs]: pip install -e '.[gcs]'")
    os.environ.setdefault("EPATH_USE_TF", "false")  # keeps TensorFlow out of the process
    from etils import epath

    return epath.Path(text)


def local_path(text: str) -> pathlib.Path:
    """A path on the command line, of which the shell has left a `~` as it is."""
    return pathlib.Path(expand(text))


def is_remote(path: str | os.PathLike) -> bool:
    """Whether a path is in an object store.

    Example:
      >>> is_remote("gs://bucket/run"), is_remote("runs/digits")
      (True, False)
    """
    return os.fspath(path).startswith("gs://")


def set_aside(path: Any) -> Any:
    """Renames a damaged file or directory to `<name>.corrupt`, and returns its new path.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "environment.json")
      >>> path.touch()
      >>> set_aside(path).name
      'environment.json.corrupt'
    """
    aside = path.with_name(f"{path.name}.corrupt")
    while aside.exists():
        aside = aside.with_name(f"{aside.name}.corrupt")
    path.rename(aside)
    return aside


def write_atomic(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file that is there as a whole or not at all, whenever the process is killed.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp(), "summary.json")
      >>> write_atomic(path, b"{}")
      >>> path.read_text()
      '{}'
    """
    if is_remote(path):
        to_path(path).write_bytes(content)
        return
    path = pathlib.Path(path)
    # On the same file system as the target, since os.replace is atomic only there.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:  # such as a full disk, of which it would keep its part
        temporary.unlink(missing_ok=True)
        raise
