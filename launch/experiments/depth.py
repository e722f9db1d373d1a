"""From 20 to 1,004 plain layers on the digits."""

import statistics

from experiments.arms import LADDER, digits
from experiments.report import accuracy, table, write_report
from orthojax.analysis.picture import COLOURS, clear_frame, new_picture
from orthojax.sweep import tuned

TITLE = "Depth: plain nets on the digits"
DEPTHS = (20, 44, 110, 302, 1004)
BASELINE_DEPTHS = (20, 44, 110)
SEARCH_STEPS = 100


def jobs(options):
    """Each depth at a learning rate of its own; the baseline where its cost is small."""
    found = {}
    for method, depths in (("isometric", DEPTHS), ("l2", BASELINE_DEPTHS)):
        for depth in depths:
            directory = options.workdir / f"{method}{depth}"
            found[method, depth] = tuned(
                digits(depth, method),
                directory,
                options.seeds,
                rates=LADDER,
                start=0.002 if depth > 302 else 0.005,
                search_steps=SEARCH_STEPS,
            )
    return found


def report(options, results):
    """Accuracy against depth. What compiling and memory cost is in `launch/benchmark.py`."""
    rows = []
    for (method, depth), records in results.items():
        seconds = [record["seconds"] for record in records if record["seconds"] is not None]
        config = digits(depth, method)
        rows.append(
            [
                {"isometric": "isometric", "l2": "SGD + L2"}[method],
                f"{depth:,}",
                f"{config.model.bn_bias:g}",
                f"{records[0]['learning_rate']:g}",
                accuracy(records),
                f"{statistics.fmean(seconds):.0f} s" if seconds else "-",
            ]
        )
    headings = [
        "method",
        "layers",
        "BN bias",
        "learning rate",
        "test accuracy (%)",
        "time of a run",
    ]
    write_report(
        options,
        TITLE,
        table(headings, rows),
        f"300 steps of 128 images, width 8, n = {len(options.seeds)}. The learning rate is the one "
        f"with the smallest training loss after {SEARCH_STEPS} steps.",
        pictures={"depth": _draw(results)},
        records=results,
    )


def _draw(results):
    picture = new_picture(5, 3.6)
    axes = picture.subplots()
    names = {"isometric": "isometric", "l2": "SGD + L2"}
    for colour, (method, label) in zip(COLOURS, names.items(), strict=False):
        found = {depth: records for (m, depth), records in results.items() if m == method}
        values = {d: [100 * r["test_accuracy"] for r in records] for d, records in found.items()}
        axes.plot(
            list(found), [statistics.fmean(v) for v in values.values()], color=colour, label=label
        )
        for depth, points in values.items():
            axes.plot([depth] * len(points), points, ".", color=colour)
    axes.set(xscale="log", xlabel="layers", ylabel="test accuracy (%)", ylim=(0, 101))
    axes.set_xticks(DEPTHS, [f"{depth:,}" for depth in DEPTHS])
    axes.minorticks_off()
    clear_frame(axes)
    axes.legend(frameon=False)
    return picture
