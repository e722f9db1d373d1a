"""Decoded splits on disk, so that a data set is decoded once on a machine and not once a run."""

import hashlib
import os
import pathlib
import urllib.parse
import uuid
from collections.abc import Callable

import numpy as np

from orthojax.caches import cache_directory, expand
from orthojax.console import tell

Arrays = dict[str, np.ndarray]

# Of the reader that decodes, and of these files: of another version they are made anew.
_VERSION = "2"


def default_directory() -> pathlib.Path | None:
    """Where decoded splits are kept: `datasets` in the user's cache; None without a home."""
    return cache_directory("datasets")


def entry(
    cache_dir: str | None, name: str, directory: str, split: str, downsample: int
) -> pathlib.Path | None:
    """The file of one decoded split: `<cache>/<name>/<version>/<directory's hash>/<split>.npz`.

    None where there is no place for it.

    The records' directory is in the path, so two prepared copies of a set do not displace each
    other; its `fingerprint` is in the file, so a set prepared anew does displace its old self.
    """
    root = pathlib.Path(expand(cache_dir)) if cache_dir else default_directory()
    if root is None:
        return None
    place = hashlib.sha256(os.path.realpath(directory).encode()).hexdigest()[:16]
    pooled = f"-downsample{downsample}" if downsample > 1 else ""
    return root / name / place / f"{urllib.parse.quote(split, safe='')}{pooled}.npz"


def fingerprint(directory: str) -> str:
    """Hash of a prepared set: its metadata, and every file's name, size and time of change."""
    digest = hashlib.sha256(_VERSION.encode())
    for path in sorted(pathlib.Path(directory).iterdir()):
        stat = path.stat()
        digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
    return digest.hexdigest()


def read_or_build(path: pathlib.Path | None, key: str, build: Callable[[], Arrays]) -> Arrays:
    """Returns what `path` holds for `key`, see `fingerprint`, or builds it and leaves it there.

    A damaged file is reported on stderr and replaced, one of another key is replaced. The file
    appears whole or not at all. Where it cannot be written, stderr says that nothing was cached.
    """
    if path is None:
        return build()
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        found = arrays.pop("key").item()
        if found == _key(key, arrays):
            return arrays
        if found.startswith(f"{key} "):
            raise ValueError("its arrays are not those that were written")
    except (FileNotFoundError, NotADirectoryError):
        pass
    except Exception as error:  # zipfile and NumPy raise what they like
        tell(f"{path} is damaged ({type(error).__name__}: {error}); making it anew")
    arrays = build()
    try:
        _write(path, key, arrays)
    except OSError as error:
        tell(f"cannot cache decoded images as {path}: {error}")
    return arrays


def _write(path: pathlib.Path, key: str, arrays: Arrays) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            np.savez(file, key=np.array(_key(key, arrays)), **arrays)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _key(key: str, arrays: Arrays) -> str:
    """What a file is for and what is in it: zip's checksums cover what is read, but no names.

    A damaged shape that is too small has less read than there is, and no checksum looked at.
    """
    return " ".join([key, *(f"{n}:{a.dtype.str}{a.shape}" for n, a in sorted(arrays.items()))])
