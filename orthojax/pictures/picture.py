"""Making pictures without pyplot: no global state, and no window system is looked for."""

import contextlib
import io
import os
import pathlib
import sys
from typing import Any

from orthojax.console import printable
from orthojax.errors import UserError
from orthojax.storage.paths import check_output, write_atomic

FORMATS = ("png", "svg", "pdf", "jpg", "jpeg", "webp")

# That the color-blind can tell apart (Okabe and Ito).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def new_picture(width: float, height: float) -> Any:
    """An empty `matplotlib.figure.Figure`; sizes in inches.

    Example:
      >>> new_picture(4, 3).axes
      []
    """
    _import_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    picture = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(picture)
    return picture


def _import_matplotlib() -> None:
    """Imports it even where MPLBACKEND names a backend that it does not know: none is used here."""
    if "matplotlib" in sys.modules or "MPLBACKEND" not in os.environ:
        return
    backend = os.environ.pop("MPLBACKEND")
    import matplotlib

    os.environ["MPLBACKEND"] = backend
    with contextlib.suppress(ValueError):
        matplotlib.rcParams["backend"] = backend


def check_picture(path: str | os.PathLike) -> None:
    """Finds out, before there is a picture, whether `write_picture` can write it.

    Raises:
      UserError: its name ends in no format of pictures, or it cannot be written.
    """
    kind = pathlib.PurePath(path).suffix[1:].lower()
    if kind not in FORMATS:
        raise UserError(f"{os.fspath(path)!r} is the name of no picture; end it in .png or .svg")
    check_output(path)


def write_picture(picture: Any, path: str | os.PathLike) -> None:
    """Writes a picture as what the path ends in, one of `FORMATS`.

    Raises:
      UserError: see `check_picture`.

    Example:
      >>> import tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "empty.svg")
      >>> write_picture(new_picture(1, 1), path)
      >>> os.path.exists(path)
      True
    """
    check_picture(path)
    content = io.BytesIO()
    picture.savefig(content, format=pathlib.PurePath(path).suffix[1:].lower(), dpi=150)
    write_atomic(path, content.getvalue())


def label(name: str) -> str:
    """A name as it is drawn: no control characters, and no formulas between dollar signs.

    Example:
      >>> print(label("a$b"))
      a\\$b
    """
    return printable(name).replace("$", r"\$")


def clear_frame(axes: Any) -> None:
    """Leaves of the frame the left and the lower side, and adds a faint grid."""
    axes.grid(True, which="major", linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
