"""Errors that are the user's to mend: each message names the offending thing and the way out."""


class UserError(Exception):
    """Bad input: a key, a name, a path or a number that cannot be used as given.

    Entry points under `launch/` print the message alone, without a traceback, and exit with
    status 2. Everything else that goes wrong keeps its traceback.
    """


class ConfigError(UserError, ValueError):
    """A configuration holds an unknown, missing or impossible value."""


class DatasetError(UserError):
    """A data set is unknown, not prepared, or too small for what is asked of it."""


class WorkdirError(UserError):
    """A working directory belongs to another run, or its checkpoints cannot be used."""


class DivergenceError(UserError, FloatingPointError):
    """Training produced NaN or Inf; the last good checkpoint is kept."""


class WorkdirBusyError(WorkdirError):
    """Another process is training in a working directory."""
