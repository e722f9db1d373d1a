"""Which parameters are penalized, as what matrices, and why the others are not: a table."""

import dataclasses
from typing import Any

import jax

from orthojax.errors import ConfigError
from orthojax.ortho.kernels import Kernel, find_kernels
from orthojax.ortho.measures import errors_of
from orthojax.ortho.views import View

_WIDEST = 30  # characters of a reason that stands in the table
_HEADINGS = ("path", "shape", "blocks", "f_in × f_out", "groups", "penalized", "error")


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
      path: Its place in the tree, joined by `/`.
      shape: Its shape.
      blocks: Matrices side by side: stacked layers × feature groups. 0 if not penalized.
      fan: `(f_in, f_out)` of each of them, or `None`.
      groups: Sizes of the column groups of each of them.
      reason: Why it is not penalized; empty if it is.
      error: `orthonormality_error` of its worst group; `None` if not penalized or without values.
    """

    path: str
    shape: tuple[int, ...]
    blocks: int = 0
    fan: tuple[int, int] | None = None
    groups: tuple[int, ...] = ()
    reason: str = ""
    error: float | None = None

    @property
    def penalized(self) -> bool:
        """Whether `optax_ortho` with the same arguments touches it."""
        return not self.reason

    def cells(self, note: str = "") -> tuple[str, ...]:
        """The row as text, one cell for each heading; a note stands instead of a reason."""
        shape = "×".join(map(str, self.shape)) or "scalar"
        if self.fan is None or self.reason:
            return (self.path, shape, "", "", "", f"no: {note or self.reason}", "")
        error = "" if self.error is None else f"{self.error:.2e}"
        fan = f"{self.fan[0]} × {self.fan[1]}"
        return (self.path, shape, str(self.blocks), fan, _runs(self.groups), "yes", error)


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of `describe`, in the order of the tree; `print` it or read `rows`."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        reasons = dict.fromkeys(row.reason for row in self.rows if len(row.reason) > _WIDEST)
        notes = {reason: f"see note {number}" for number, reason in enumerate(reasons, 1)}
        lines = [_HEADINGS, *(row.cells(notes.get(row.reason, "")) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        penalized = sum(row.penalized for row in self.rows)
        text += [f"note {number}: {reason}" for number, reason in enumerate(reasons, 1)]
        return "\n".join([*text, f"{penalized} of {len(self.rows)} parameters penalized"])


def describe(
    params: Any, mask: Any = None, *, view: View | Any = None, grouping: str = "ceil"
) -> Table:
    """List every parameter with the matrix that `optax_ortho` with these arguments sees in it.

    Columns: path; shape; blocks (stacked layers × feature groups); `f_in × f_out` of a block; sizes
    of its column groups; penalized, or why not; `orthonormality_error` at present. A parameter that
    the view cannot tell, an error elsewhere, is a row here; its text, like every long reason, is a
    note below the table. What is no array (`None`, a function, a Python number) is no parameter and
    has no row.

    Args:
      params: Parameter tree, of arrays or of `jax.ShapeDtypeStruct` (then without errors).
      mask, view, grouping: See `optax_ortho`.

    Returns:
      A `Table`; `str` of it is the table as text.

    Raises:
      ConfigError: `params` is no tree of arrays; an unknown grouping; an invalid mask or view.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = {"conv": {"kernel": jnp.zeros((3, 3, 3, 64)), "bias": jnp.zeros(64)}}
      >>> print(describe(tree))
      path         shape     blocks  f_in × f_out  groups     penalized       error
      conv/bias    64                                         no: named bias
      conv/kernel  3×3×3×64  1       27 × 64       2×27 + 10  yes             1.00e+00
      1 of 2 parameters penalized
    """
    found = [
        (path, array, kernel)
        for path, array, kernel in find_kernels(params, mask, view, grouping)
        if hasattr(array, "shape") and hasattr(array, "dtype")
    ]
    kernels = [(array, kernel) for _, array, kernel in found if isinstance(kernel, Kernel)]
    abstract = any(isinstance(array, jax.ShapeDtypeStruct) for array, _ in kernels)
    errors = {} if abstract else errors_of(kernels)
    return Table(tuple(_row(*entry, errors.get(entry[0])) for entry in found))


def _row(path, array, kernel: Kernel | str | ConfigError, error):
    shape = tuple(array.shape)
    if isinstance(kernel, ConfigError):
        return Row(path, shape, reason=f"ERROR: {kernel}")
    if isinstance(kernel, str):
        return Row(path, shape, reason=kernel)
    blocks = kernel.blocks // len(kernel.groups)
    error = None if error is None else float(error)
    return Row(path, shape, blocks, kernel.fan, kernel.groups, error=error)


def _runs(sizes) -> str:
    """Group sizes, equal neighbors counted: `(27, 27, 10)` as `2×27 + 10`."""
    if len(sizes) == 1:
        return str(sizes[0])
    first = sum(size == sizes[0] for size in sizes)
    rest = sizes[first:]
    parts = [(first, sizes[0])] + ([(len(rest), rest[0])] if rest else [])
    return " + ".join(f"{count}×{size}" if count > 1 else str(size) for count, size in parts)
