"""What a program says to the person who started it, if anybody can still read it."""

import contextlib
import sys
from typing import TextIO


def tell(text: str, stream: TextIO | None = None, end: str = "\n") -> None:
    """Writes to stderr or another stream, if it is still there.

    A closed terminal, a broken pipe or a full disk behind a log is no reason to stop training.

    Args:
      text: what to write.
      stream: where; None is `sys.stderr`.
      end: what follows the text.
    """
    stream = sys.stderr if stream is None else stream  # itself None where it was closed at start
    with contextlib.suppress(OSError, ValueError, AttributeError):
        stream.write(text + end)
        stream.flush()


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal; one that was closed is none."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return stream.isatty()
    return False
