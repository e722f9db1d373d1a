"""Training curves of one run, and of several beside each other."""

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from orthojax.pictures.picture import COLORS, clear_frame, label, new_picture, write_picture

_THIN = {"linewidth": 1.2}
_MARKED = {"linewidth": 1.8, "marker": "o", "markersize": 3.5}

Records = Iterable[Mapping[str, Any]]


def draw_curves(records: Records, path: str | os.PathLike, title: str = "") -> None:
    """Draws loss and accuracy against training steps, two panels, as a PNG.

    Args:
      records: from `orthojax.storage.metrics.read_metrics`; of the kinds `train`, `validation`
        and `test`, the keys `loss` and `accuracy` (a fraction of one) are drawn where present and
        finite.
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
    records = list(records)
    lines = [
        (records, "train", {"label": "train", "color": COLORS[0], **_THIN}),
        (records, "validation", {"label": "validation", "color": COLORS[2], **_MARKED}),
        (records, "test", {"label": "test", "color": COLORS[1], **_MARKED}),
    ]
    _draw(lines, path, title)


def draw_comparison(
    runs: Mapping[str, Iterable[Records]], path: str | os.PathLike, title: str = ""
) -> None:
    """Draws several methods in the panels of `draw_curves`, one color each.

    Training curves are thin; test curves have markers, and with a validation split are a point.

    Args:
      runs: from a method's name to the records of its runs, one for each seed.
      path: the picture to write.
      title: stands above both panels.

    Example:
      >>> import os, tempfile
      >>> records = [{"step": s, "kind": "test", "loss": 2 / s, "accuracy": 0.5} for s in (1, 2)]
      >>> path = os.path.join(tempfile.mkdtemp(), "comparison.png")
      >>> draw_comparison({"plain": [records], "residual": [records, records]}, path)
      >>> os.path.exists(path)
      True
    """
    lines = []
    for index, (name, seeds) in enumerate(runs.items()):
        color = COLORS[index % len(COLORS)]
        for seed, records in enumerate(seeds):
            records = list(records)
            shown = label(name) if seed == 0 else None
            lines.append((records, "train", {"color": color, "alpha": 0.45, **_THIN}))
            lines.append((records, "test", {"color": color, "label": shown, **_MARKED}))
    _draw(lines, path, title)


def _draw(lines: list[tuple[list, str, dict]], path: str | os.PathLike, title: str) -> None:
    picture = new_picture(9, 3.4)
    loss, accuracy = picture.subplots(1, 2)
    losses = [value for line in lines for value in _plot(loss, *line, "loss", 1.0)]
    for line in lines:
        _plot(accuracy, *line, "accuracy", 100.0)
    # Where it spans less than a factor of ten a logarithmic axis has hardly a tick to read.
    if losses and min(losses) > 0 and max(losses) >= 10 * min(losses):
        loss.set_yscale("log")
    loss.set_ylabel("cross-entropy loss")
    accuracy.set_ylabel("accuracy (%)")
    accuracy.set_ylim(0, 101)
    for axes in (loss, accuracy):
        axes.set_xlabel("training step")
        clear_frame(axes)
        if axes.lines:
            axes.legend(frameon=False, loc="best")
    picture.suptitle(label(title))
    write_picture(picture, path)


def _plot(
    axes: Any, records: list, kind: str, style: dict[str, Any], key: str, scale: float
) -> list[float]:
    """Draws one line and returns its finite values."""
    points = [
        (record["step"], scale * record[key])
        for record in records
        if record["kind"] == kind and math.isfinite(record.get(key, math.nan))
    ]
    if not points:
        return []
    steps, values = zip(*points, strict=True)
    axes.plot(steps, values, **style)
    return list(values)
