"""Worker processes that end when the process that started them is killed."""

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """To be called in a worker process, which then does not outlive its parent, however that ends.

    Neither Grain nor `concurrent.futures` sees to it when the parent is killed.
    """
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)
