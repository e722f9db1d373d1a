"""Training curves."""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

# Colours that the colour-blind can tell apart (Okabe and Ito).
_STYLES = {
    "train": {"color": "#0072B2", "linewidth": 1.2},
    "test": {"color": "#D55E00", "linewidth": 1.8, "marker": "o", "markersize": 3.5},
}


def draw_curves(
    records: Iterable[Mapping[str, Any]], path: str | os.PathLike, title: str = ""
) -> None:
    """Draws loss and accuracy against training steps, two panels, as a PNG.

    Args:
      records: from `orthojax.metrics.read_metrics`; of the kinds `train` and `test`, the keys
        `loss` and `accuracy` (a fraction of one) are drawn where present and finite.
      path: the picture to write.
      title: stands above both panels.

    Example:
      >>> import os, tempfile
      >>> records = [{"step": s, "kind": "train", "loss": 2 / s, "accuracy": 0.5} for s in (1, 2)]
      >>> path = os.path.join(tempfile.mkdtemp(), "curves.png")
      >>> draw_curves(records, path, title="plain-110")
      >>> os.path.exists(path)
      True
    """
    # Without pyplot: no global state, and no window system is looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = list(records)
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    losses = _plot(loss, records, "loss", 1.0)
    _plot(accuracy, records, "accuracy", 100.0)
    # Where it spans less than a factor of ten a logarithmic axis has hardly a tick to read.
    if losses and min(losses) > 0 and max(losses) >= 10 * min(losses):
        loss.set_yscale("log")
    loss.set_ylabel("cross-entropy loss")
    accuracy.set_ylabel("accuracy (%)")
    accuracy.set_ylim(0, 101)
    for axes in (loss, accuracy):
        axes.set_xlabel("training step")
        axes.grid(True, which="major", linewidth=0.5, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            # Accuracies end near the top or, at chance level, near the bottom.
            axes.legend(frameon=False, loc="best" if axes is loss else "center right")
    figure.suptitle(title)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=150)


def _plot(axes: Any, records: list[Mapping[str, Any]], key: str, scale: float) -> list[float]:
    """Draws one line for each kind and returns the finite values."""
    drawn = []
    for kind, style in _STYLES.items():
        points = [
            (record["step"], scale * record[key])
            for record in records
            if record["kind"] == kind and math.isfinite(record.get(key, math.nan))
        ]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, label=kind, **style)
            drawn += values
    return drawn
