"""Where this project keeps what it can make again."""

import os
import pathlib


def cache_directory(name: str) -> pathlib.Path:
    """`$XDG_CACHE_HOME/orthojax/<name>`, in `~/.cache` where that is not an absolute path.

    Example:
      >>> cache_directory("xla").parts[-2:]
      ('orthojax', 'xla')
    """
    root = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
    if not os.path.isabs(root):  # which its specification has ignored
        root = os.path.expanduser("~/.cache")
    return pathlib.Path(root, "orthojax", name)
