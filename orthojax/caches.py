"""Where this project keeps what it can make again, and what a `~` stands for."""

import os
import pathlib
import stat

from orthojax.errors import UserError

OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_directory(name: str) -> pathlib.Path | None:
    """`$XDG_CACHE_HOME/orthojax/<name>`, in `~/.cache` where that is not an absolute path.

    None where there is no home directory either, as in a container that runs under any user's
    number.

    Example:
      >>> cache_directory("xla").parts[-2:]
      ('orthojax', 'xla')
    """
    # Its specification has a relative one ignored.
    for given in (os.environ.get("XDG_CACHE_HOME", ""), "~/.cache"):
        root = os.path.expanduser(given)
        if os.path.isabs(root):
            return pathlib.Path(root, "orthojax", name)
    return None


def keep_private(directory: pathlib.Path) -> None:
    """Makes a directory for code that will be run, unless it is there; nobody else can write in it.

    Raises:
      OSError: it cannot be made.
      PermissionError: it belongs to somebody else (but for root), or others can write in it.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not hasattr(os, "getuid"):  # Windows keeps a user's files apart by other means
        return
    status = directory.stat()
    if status.st_uid == os.getuid() and status.st_mode & OTHERS_MAY_WRITE:
        directory.chmod(stat.S_IMODE(status.st_mode) & ~OTHERS_MAY_WRITE)
        status = directory.stat()
    if status.st_uid not in (os.getuid(), 0):
        reason = f"belongs to user {status.st_uid}"
    elif status.st_mode & OTHERS_MAY_WRITE:
        reason = "can be written by other users"
    else:
        return
    raise PermissionError(
        f"{directory} {reason}, whose code is not run; set XDG_CACHE_HOME to a directory of yours"
    )


def expand(path: str) -> str:
    """A path in which a leading `~`, or `~NAME`, is replaced by the home directory.

    Raises:
      UserError: there is no such home directory. A directory called `~` is never meant.

    Example:
      >>> expand("runs/~digits")
      'runs/~digits'
    """
    expanded = os.path.expanduser(path)
    if path.startswith("~") and not os.path.isabs(expanded):
        raise UserError(
            f"{path}: there is no home directory {path.partition('/')[0]}; set HOME, or give the "
            "whole path"
        )
    return expanded
