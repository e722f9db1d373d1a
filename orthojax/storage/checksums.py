"""Checksums of the files of a directory, kept in the directory."""

import hashlib
import json
import os
import pathlib
from collections.abc import Sequence

_FILE = "checksums.json"


def write_checksums(directory: str | os.PathLike, subdirectories: Sequence[str]) -> None:
    """Writes `checksums.json` with the SHA-256 of every file below the subdirectories.

    Example:
      >>> import tempfile
      >>> directory = pathlib.Path(tempfile.mkdtemp())
      >>> (directory / "state").mkdir()
      >>> _ = (directory / "state" / "kernel").write_text("1.0")
      >>> write_checksums(directory, ["state"])
      >>> find_damage(directory)
      >>> _ = (directory / "state" / "kernel").write_text("1.1")
      >>> find_damage(directory)
      'state/kernel is damaged: its checksum is not the one that was saved'
    """
    directory = pathlib.Path(directory)
    checksums = {
        path.relative_to(directory).as_posix(): _sha256(path)
        for subdirectory in subdirectories
        for path in sorted((directory / subdirectory).rglob("*"))
        if path.is_file()
    }
    (directory / _FILE).write_text(json.dumps(checksums, indent=1), encoding="utf-8")


def find_damage(directory: str | os.PathLike) -> str | None:
    """Says which file is missing or other than it was, or returns None where all are well."""
    directory = pathlib.Path(directory)
    try:
        for name, checksum in json.loads((directory / _FILE).read_bytes()).items():
            if _sha256(directory / name) != checksum:
                return f"{name} is damaged: its checksum is not the one that was saved"
    except FileNotFoundError as error:
        return f"{pathlib.Path(error.filename).relative_to(directory)} is missing"
    except OSError as error:
        return str(error)
    except (ValueError, AttributeError):  # no JSON, or JSON of another kind
        return f"{_FILE} is damaged"
    return None


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
