"""Errors that are the user's to mend: each message names the offending thing and the way out."""

import errno

# What the storage says when the same program, started again, would hear the same. Not among them:
# a server that does not answer, a file that is busy or stale, memory and descriptors used up.
_PERMANENT = {
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "ENOENT", "EEXIST", "ENOTEMPTY"),
        *("ENAMETOOLONG", "ELOOP", "EILSEQ", "EINVAL", "EXDEV", "ENXIO", "ENODEV", "EFBIG"),
        *("ENOSPC", "EDQUOT", "EIO", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"),
    )
    if hasattr(errno, name)
}


class UserError(Exception):
    """Bad input: a key, a name, a path or a number that cannot be used as given.

    Entry points under `launch/` print the message alone, without a traceback, and exit with
    status 2, and so they do with what the storage refuses for good (`is_permanent`). Everything
    else that goes wrong keeps its traceback.
    """


class ConfigError(UserError, ValueError):
    """A configuration holds an unknown, missing or impossible value."""


class DatasetError(UserError):
    """A data set is unknown, not prepared, or too small for what is asked of it."""


class WorkdirError(UserError):
    """A working directory belongs to another run, or its checkpoints cannot be used."""


class DivergenceError(UserError, FloatingPointError):
    """Training produced NaN or Inf; the last good checkpoint is kept."""


class MissingExtraError(UserError, ImportError):
    """A package that an extra of this distribution brings is not installed."""


class WorkdirBusyError(WorkdirError):
    """Another process is training in a working directory."""


def is_permanent(error: OSError) -> bool:
    """Whether a refusal of the storage is the user's to mend: starting again would not.

    Example:
      >>> is_permanent(PermissionError(errno.EACCES, "Permission denied"))
      True
      >>> is_permanent(TimeoutError(errno.ETIMEDOUT, "Connection timed out"))
      False
    """
    return error.errno in _PERMANENT
