"""Paths on this machine and in object stores (`gs://…`), where nothing is ever half written.

An object store has no appending, no renaming and no locks, but an object appears as a whole or not
at all. So the differences are few, and they are all here.
"""

import os
import pathlib
import re
import secrets
import stat
import tempfile
from typing import Any

from orthojax.caches import expand
from orthojax.errors import UserError, WorkdirError
from orthojax.extras import require

# What orbax, while it saves, takes for a pattern; and what TensorStore cannot open.
PATTERNS, NEVER = "*?[", "\\"
TEMPORARY = ".tmp"  # ends the name of a file that is being written


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
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return pathlib.Path(expand(text))
    if not text.startswith("gs://"):
        raise WorkdirError(f"{text}: only gs:// and this machine's own paths can be used")
    require("gcs", text)
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


def name_fault(path: str | os.PathLike, forbidden: str = PATTERNS + NEVER) -> str | None:
    """Says why files below a path could be written and not be read again, or returns None.

    Args:
      path: of a directory.
      forbidden: characters that no part of the absolute path may have.

    Example:
      >>> name_fault("/runs/a[1]")
      "'/runs/a[1]' has a '[' in it, and what is written there could not be read again; ..."
      >>> name_fault("/runs/a")
    """
    text = os.fspath(path) if is_remote(path) else os.path.abspath(path)
    found = [character for character in text if character in forbidden and character != os.sep]
    found += [character for character in text if "\ud800" <= character <= "\udfff"]  # no UTF-8
    if not found:
        return None
    return (
        f"{text!r} has a {found[0]!r} in it, and what is written there could not be read again; "
        "choose another directory, or rename that one"
    )


def inside(directory: Any, name: str) -> Any:
    """The path of a file below a directory, of which nothing leads outside, such as a link.

    Args:
      directory: from `to_path`.
      name: relative, with `/` between its parts.

    Raises:
      FileNotFoundError: there is none.
      WorkdirError: it is outside the directory, or is no regular file.
    """
    if is_remote(directory):
        if ".." in name.split("/"):
            raise WorkdirError(f"{name!r} is outside {directory}")
        return directory / name
    root = os.path.realpath(directory)
    path = os.path.realpath(os.path.join(root, name))
    if not _is_below(path, root):
        raise WorkdirError(f"{name!r} leads out of {directory}, to {path}")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise WorkdirError(f"{directory / name} is no file")
    return directory / name


def foreign(directory: Any) -> str | None:
    """Says what in a directory, or below, is neither a file nor a directory of it; None is nothing.

    That is a link that leads out of it, a device, a pipe.
    """
    if is_remote(directory):
        return None
    root = os.path.realpath(directory)
    for place, directories, files in os.walk(directory):
        for name in (*directories, *files):
            path = os.path.join(place, name)
            if os.path.islink(path):
                if not _is_below(os.path.realpath(path), root):
                    return f"{path} is a link that leads out of {directory}"
            elif os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
                return f"{path} is no file"
    return None


def _is_below(path: str, root: str) -> bool:
    return path.startswith(os.path.join(root, ""))


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


def check_output(path: str | os.PathLike) -> None:
    """Proves that `write_atomic` can write a file, before the work whose result it is to hold.

    Raises:
      UserError: it cannot; the message names the path and says why.

    Example:
      >>> check_output("no/such/directory/net.stablehlo")
      Traceback (most recent call last):
      ...
      orthojax.errors.UserError: 'no/such/directory/net.stablehlo' cannot be written: ...
    """
    if is_remote(path):
        to_path(path)
        return
    file = os.fspath(to_path(path)) if os.fspath(path) else ""
    try:
        try:
            mode = os.stat(file).st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG
        if not file or stat.S_ISDIR(mode):
            raise UserError(f"{file!r} is no file to write to; name one")
        if stat.S_ISREG(mode):
            with tempfile.TemporaryFile(dir=os.path.dirname(os.path.realpath(file))):
                pass
        elif not os.access(file, os.W_OK):
            raise UserError(f"{file!r} cannot be written: no permission; name another")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file!r} cannot be written: {getattr(error, 'strerror', None) or error}; name a file "
            "in a directory that is there and that you can write to"
        ) from error


def output_directory(path: str | os.PathLike, *names: str) -> Any:
    """Makes a directory, and proves that files can be written into it; returns `to_path` of it.

    Args:
      path: of the directory; one that is there is taken.
      *names: of the files, see `check_output`.

    Raises:
      UserError: it cannot be made or written to; the message names it and says why.
    """
    directory = to_path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not is_remote(path):
            with tempfile.TemporaryFile(dir=directory):
                pass
    except (OSError, ValueError) as error:
        raise UserError(
            f"{os.fspath(path)!r} is no directory that can be written to: "
            f"{getattr(error, 'strerror', None) or error}; choose another"
        ) from error
    for name in names:
        check_output(directory / name)
    return directory


def write_atomic(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file that is there as a whole or not at all, whenever the process is killed.

    Of several processes that write the same file, one has written it. A link stays, and what it
    leads to is replaced. What is no regular file, such as `/dev/stdout`, is written to.

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
    path = to_path(path)
    if path.exists() and not path.is_file():
        path.write_bytes(content)
        return
    path = pathlib.Path(os.path.realpath(path))
    # On the same file system as the target, since os.replace is atomic only there.
    temporary = path.with_name(f".{secrets.token_hex(8)}{TEMPORARY}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # such as a full disk, of which it would keep its part
        temporary.unlink(missing_ok=True)
        raise
