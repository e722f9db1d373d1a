"""Ctrl-C and SIGTERM as a request to stop at the next step, not as a death."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator


class Interrupted(Exception):
    """Training was asked to stop and has saved; the same command resumes it.

    Attributes:
      signal_number: the signal that asked.
    """

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Which signal has asked to stop, or None."""

    signal_number: int | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While open, the first SIGINT or SIGTERM is noted; a second one acts as it always does.

    Outside the main thread, where Python allows no handlers, nothing is caught.

    Example:
      >>> import os
      >>> with stop_on_signals() as request:
      ...     os.kill(os.getpid(), signal.SIGTERM)
      ...     print(request.signal_number == signal.SIGTERM)
      True
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number, frame):
        del frame
        request.signal_number = number
        signal.signal(number, previous[number])
        name = signal.Signals(number).name
        print(f"\n{name}: stopping after this step; once more stops at once", file=sys.stderr)

    for number in previous:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
