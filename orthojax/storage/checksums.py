"""Checksums of files of a directory, kept in the directory."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from orthojax.errors import WorkdirError
from orthojax.storage.paths import foreign, inside, write_atomic

CHECKSUMS = "checksums.json"


def write_checksums(directory: Any, names: Sequence[str]) -> None:
    """Writes `checksums.json` with the SHA-256 of files, and of every file below subdirectories.

    Args:
      directory: from `to_path`; of an object store if the names are of files.
      names: of what is in it; what is missing is left out.

    Example:
      >>> import pathlib, tempfile
      >>> directory = pathlib.Path(tempfile.mkdtemp())
      >>> (directory / "state").mkdir()
      >>> _ = (directory / "state" / "kernel").write_text("1.0")
      >>> write_checksums(directory, ["state"])
      >>> find_damage(directory)
      >>> _ = (directory / "state" / "kernel").write_text("1.1")
      >>> find_damage(directory)
      'state/kernel is damaged: its checksum is not the one that was saved'
    """
    checksums = {
        path.relative_to(directory).as_posix(): _sha256(path)
        for name in names
        for path in _files(directory / name)
    }
    write_atomic(directory / CHECKSUMS, json.dumps(checksums, indent=1).encode())


def find_damage(directory: Any, only: str = "") -> str | None:
    """Says which file is missing or other than it was, or returns None where all are well.

    A file outside the directory, whether by its name or by a link, is damage, and is not opened.

    Args:
      directory: with a `checksums.json` in it.
      only: the one file to look at; one that has no checksum is damaged. Empty is all of them.
    """
    name = CHECKSUMS
    try:
        saved = json.loads(inside(directory, CHECKSUMS).read_bytes())
        if only and only not in saved and (directory / only).exists():
            return f"{only} is damaged: it has no checksum"
        for name, checksum in saved.items():
            if only in ("", name) and _sha256(inside(directory, name)) != checksum:
                return f"{name} is damaged: its checksum is not the one that was saved"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, WorkdirError) as error:
        return str(error)
    except (
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ):  # no JSON, or JSON of another kind
        return f"{CHECKSUMS} is damaged"
    return foreign(directory)


def _files(path: Any) -> list[Any]:
    if path.is_file():
        return [path]
    return sorted(found for found in path.rglob("*") if found.is_file()) if path.exists() else []


def _sha256(path: Any) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
