"""What a program says to the person who started it, if anybody can still read it."""

import contextlib
import re
import sys
from typing import TextIO

# Controls of terminals, separators of lines, overrides of the direction, and what is no character.
_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def tell(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Writes to stderr or another stream, if it is still there.

    A closed terminal, a broken pipe or a full disk behind a log is no reason to stop training, and
    a letter that the stream's encoding lacks is written as an escape.

    Args:
      text: what to write; of control characters only tabs and ends of lines reach the stream.
      stream: where; None is `sys.stderr`.
      end: what follows the text.
    """
    stream = sys.stderr if stream is None else stream  # itself None where it was closed at start
    with contextlib.suppress(OSError, ValueError, AttributeError):
        encoding = getattr(stream, "encoding", None) or "utf-8"  # a `StringIO` has none
        told = printable(text, but="\n\t") + end
        stream.write(told.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()


def printable(text: str, but: str = "") -> str:
    """A name, of a class or a file, in which control characters are escaped.

    Args:
      text: from anywhere.
      but: what is left as it is.

    Example:
      >>> print(printable("cat\\x1b[2J"))
      cat\\x1b[2J
    """
    return _CONTROLS.sub(lambda c: c[0] if c[0] in but else ascii(c[0])[1:-1], text)


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
