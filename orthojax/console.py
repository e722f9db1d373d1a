"""What a program says to the person who started it, if anybody can still read it."""

import contextlib
import sys
from typing import TextIO


def tell(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Writes to stderr or another stream, if it is still there.

    A closed terminal, a broken pipe or a full disk behind a log is no reason to stop training, and
    a letter that the stream's encoding lacks is written as an escape.

    Args:
      text: what to write.
      stream: where; None is `sys.stderr`.
      end: what follows the text.
    """
    stream = sys.stderr if stream is None else stream  # itself None where it was closed at start
    with contextlib.suppress(OSError, ValueError, AttributeError):
        encoding = getattr(stream, "encoding", None) or "utf-8"  # a `StringIO` has none
        stream.write((text + end).encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


def escape_what_cannot_be_encoded() -> None:
    """Has stdout write as escapes what its encoding lacks, as stderr does: for programs to call.

    Before they parse their command line, whose help may hold such letters.
    """
    if hasattr(sys.stdout, "reconfigure"):  # what stands in for it, in a notebook, may have none
        sys.stdout.reconfigure(errors="backslashreplace")


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; one that was closed is none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return stream.isatty()
    return False
