"""Which parameters are penalised, as what matrices, and why the others are not: a table."""

import dataclasses
from typing import Any

import jax

from orthojax.errors import ConfigError
from orthojax.matrices import KernelAxes
from orthojax.ortho.kernels import Kernel, find_kernels
from orthojax.ortho.measures import orthonormality_error
from orthojax.ortho.resolution import resolve
from orthojax.ortho.views import View

_HEADINGS = ("path", "shape", "blocks", "f_in × f_out", "groups", "penalised", "error")


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
      path: Its place in the tree, joined by `/`.
      shape: Its shape; `None` for what is no array.
      blocks: Matrices side by side: stacked layers × feature groups. 0 if not penalised.
      fan: `(f_in, f_out)` of each of them, or `None`.
      groups: Sizes of the column groups of each of them.
      reason: Why it is not penalised; empty if it is.
      error: `orthonormality_error` of its worst group; `None` if not penalised or without values.
    """

    path: str
    shape: tuple[int, ...] | None
    blocks: int = 0
    fan: tuple[int, int] | None = None
    groups: tuple[int, ...] = ()
    reason: str = ""
    error: float | None = None

    @property
    def penalised(self) -> bool:
        """Whether `optax_ortho` with the same arguments touches it."""
        return not self.reason

    def cells(self) -> tuple[str, ...]:
        """The row as text, one cell for each heading."""
        shape = "" if self.shape is None else "×".join(map(str, self.shape)) or "scalar"
        if not self.penalised:
            return (self.path, shape, "", "", "", f"no: {self.reason}", "")
        error = "" if self.error is None else f"{self.error:.2e}"
        fan = f"{self.fan[0]} × {self.fan[1]}"
        return (self.path, shape, str(self.blocks), fan, _runs(self.groups), "yes", error)


@dataclasses.dataclass(frozen=True)
class Table:
    """The rows of `describe`, in the order of the tree; `print` it or read `rows`."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        lines = [_HEADINGS, *(row.cells() for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        penalised = sum(row.penalised for row in self.rows)
        return "\n".join([*text, f"{penalised} of {len(self.rows)} parameters penalised"])


def describe(
    params: Any, *, mask: Any = None, view: View | Any = None, grouping: str = "ceil"
) -> Table:
    """List every parameter with the matrix that `optax_ortho` with these arguments sees in it.

    Columns: path; shape; blocks (stacked layers × feature groups); `f_in × f_out` of a block; sizes
    of its column groups; penalised, or why not; `orthonormality_error` at present. A parameter that
    the view cannot tell, an error elsewhere, is a row with the error's text here.

    Args:
      params: Parameter tree, of arrays or of `jax.ShapeDtypeStruct` (then without errors).
      mask, view, grouping: See `optax_ortho`.

    Returns:
      A `Table`; `str` of it is the table as text.

    Example:
      >>> import jax.numpy as jnp
      >>> tree = {"conv": {"kernel": jnp.zeros((3, 3, 3, 64)), "bias": jnp.zeros(64)}}
      >>> print(describe(tree))
      path         shape     blocks  f_in × f_out  groups     penalised       error
      conv/bias    64                                         no: named bias
      conv/kernel  3×3×3×64  1       27 × 64       2×27 + 10  yes             1.00e+00
      1 of 2 parameters penalised
    """
    tolerant = _tolerant(resolve(view))
    found = list(find_kernels(params, mask, tolerant, grouping))
    described = {path: array for path, array, kernel in found if not isinstance(kernel, str)}
    errors = {}
    if not any(isinstance(array, jax.ShapeDtypeStruct) for array in described.values()):
        errors = orthonormality_error(params, mask=mask, view=tolerant, grouping=grouping)
    return Table(tuple(_row(*entry, errors.get(entry[0])) for entry in found))


def _tolerant(view: View) -> View:
    """The view, with an error's text as the reason for which a parameter is left out."""

    def tolerant(path, array):
        try:
            axes = view(path, array)
            if isinstance(axes, KernelAxes):
                axes.matrix_shape(tuple(array.shape))
            return axes
        except ConfigError as error:
            return f"ERROR: {error}"

    return tolerant


def _row(path, array, kernel: Kernel | str, error):
    shape = tuple(array.shape) if hasattr(array, "shape") else None
    if isinstance(kernel, str):
        return Row(path, shape, reason=kernel)
    blocks = kernel.blocks // len(kernel.groups)
    error = None if error is None else float(error)
    return Row(path, shape, blocks, kernel.fan, kernel.groups, error=error)


def _runs(sizes) -> str:
    """Group sizes, equal neighbours counted: `(27, 27, 10)` as `2×27 + 10`."""
    if len(sizes) == 1:
        return str(sizes[0])
    first = sum(size == sizes[0] for size in sizes)
    rest = sizes[first:]
    parts = [(first, sizes[0])] + ([(len(rest), rest[0])] if rest else [])
    return " + ".join(f"{count}×{size}" if count > 1 else str(size) for count, size in parts)
