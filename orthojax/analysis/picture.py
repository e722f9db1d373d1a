"""Making pictures without pyplot: no global state, and no window system is looked for."""

import contextlib
import io
import os
import pathlib
import sys
from typing import Any

from orthojax.storage.paths import write_atomic

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


def write_picture(picture: Any, path: str | os.PathLike) -> None:
    """Writes a picture as what the path ends in, `.png` or `.svg`.

    Example:
      >>> import tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "empty.svg")
      >>> write_picture(new_picture(1, 1), path)
      >>> os.path.exists(path)
      True
    """
    content = io.BytesIO()
    picture.savefig(content, format=pathlib.PurePath(path).suffix[1:], dpi=150)
    write_atomic(path, content.getvalue())


def clear_frame(axes: Any) -> None:
    """Leaves of the frame the left and the lower side, and adds a faint grid."""
    axes.grid(True, which="major", linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
