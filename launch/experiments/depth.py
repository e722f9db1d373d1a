"""From 20 to 1,004 plain layers on the digits."""

import statistics

from orthojax.experiments.arms import LADDER, digits
from orthojax.experiments.report import accuracy, table, write_report
from orthojax.experiments.sweep import tuned
from orthojax.pictures.picture import COLORS, clear_frame, new_picture

TITLE = "Depth: plain nets on the digits"
DEPTHS = (20, 44, 110, 302, 1004)
SEARCH_STEPS = 100


def jobs(options):
    """Each depth at a learning rate of its own. (The baseline is in `table2`: SGD.)"""
    return {
        depth: tuned(
            digits(depth, "near_isometric"),
            options.workdir / f"isometric{depth}",
            options.seeds,
            rates=LADDER,
            start=0.002 if depth > 302 else 0.005,
            search_steps=SEARCH_STEPS,
        )
        for depth in DEPTHS
    }


def report(options, results):
    """Accuracy against depth. What compiling and memory cost is in `launch/benchmark.py`."""
    rows = []
    for depth, records in results.items():
        seconds = [record["seconds"] for record in records if record["seconds"] is not None]
        bias, rate = digits(depth, "near_isometric").model.bn_bias, records[0]["learning_rate"]
        time = f"{statistics.fmean(seconds):.0f} s" if seconds else "-"
        rows.append([f"{depth:,}", f"{bias:g}", f"{rate:g}", accuracy(records), time])
    headings = ["layers", "BN bias", "learning rate", "test accuracy (%)", "time of a run"]
    write_report(
        options,
        TITLE,
        table(headings, rows),
        f"300 steps of 128 images, width 8, n = {len(options.seeds)}. The learning rate is the one "
        f"with the smallest training loss after {SEARCH_STEPS} steps.",
        pictures={"depth": _draw(results)},
    )


def _draw(results):
    picture = new_picture(5, 3.6)
    axes = picture.subplots()
    values = {d: [100 * r["test_accuracy"] for r in records] for d, records in results.items()}
    axes.plot(list(values), [statistics.fmean(v) for v in values.values()], color=COLORS[0])
    for depth, points in values.items():
        axes.plot([depth] * len(points), points, ".", color=COLORS[0])
    axes.set(xscale="log", xlabel="layers", ylabel="test accuracy (%)", ylim=(0, 101))
    axes.set_xticks(DEPTHS, [f"{depth:,}" for depth in DEPTHS])
    axes.minorticks_off()
    clear_frame(axes)
    return picture
