"""Ctrl-C, SIGTERM and SIGHUP as a request to stop at the next step, not as a death."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from orthojax.console import tell


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

    def reached(self, step: int) -> bool:
        """Whether to stop after this step; to be asked at every step.

        With several processes a SIGTERM that reached any of them is told to all, and all say yes
        at the same step: JAX's preemption service takes the signal and agrees on the step.
        """
        if jax.process_count() == 1:
            return self.signal_number is not None
        stop = multihost_utils.reached_preemption_sync_point(step)
        if stop:
            self.signal_number = signal.SIGTERM
        return stop


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While open, the first SIGINT, SIGTERM or SIGHUP is noted; a second acts as it always does.

    SIGHUP, which a closed terminal or a lost connection sends, stays ignored where it is (`nohup`).
    Outside the main thread, where Python allows no handlers, nothing is caught.

    Example:
      >>> with stop_on_signals() as request:
      ...     os.kill(os.getpid(), signal.SIGTERM)
      ...     print(request.reached(step=1), request.signal_number == signal.SIGTERM)
      True True
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    several = jax.process_count() > 1
    # Of several processes SIGTERM belongs to JAX's preemption service.
    noted = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        noted.append(hangup)
    previous = {number: signal.getsignal(number) for number in noted}

    def note(number, frame):
        del frame
        request.signal_number = number
        signal.signal(number, again)
        name = signal.Signals(number).name
        tell(f"\n{name}: stopping after this step; once more stops at once")
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def again(number, frame):
        # Not at once after the first: `launch/` watches for a signal whose handler is its own.
        del frame
        signal.signal(number, previous[number])
        os.kill(os.getpid(), number)

    for number in previous:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
