"""Depth: from 20 to 1,004 plain layers on the digits.

300 steps of 128 images, width 8. Each depth has the learning rate of a ladder, two or three to a
factor of ten, with the smallest training loss of the first seed after 100 steps. What compiling and
memory cost is in `launch/benchmark.py`, the baseline in `table2`: SGD.
"""

from orthojax.experiments import arms
from orthojax.experiments.report import against_depth, arms_table, draw, mean, write_report
from orthojax.experiments.sweep import tuned

STARTS = {20: 0.005, 44: 0.005, 110: 0.005, 302: 0.005, 1004: 0.002}  # of the search, by depth
TIME = "time of a run"


def jobs(options):
    """Each depth at a learning rate of its own."""
    return {
        depth: tuned(
            config(depth), *options.arm(f"isometric{depth}"), start=start, search_steps=100
        )
        for depth, start in STARTS.items()
    }


def config(depth):
    """The recipe at a depth."""
    return arms.digits(depth, "near_isometric")


def report(options, results):
    """Accuracy against depth."""
    found = {(f"{d:,}", f"{config(d).model.bn_bias:g}"): runs for d, runs in results.items()}
    headings = ["layers", "BN bias", "learning rate", "test accuracy (%)", TIME, "n"]
    table = arms_table(headings, found, **{TIME: _seconds})
    drawn = {(depth, "near-isometric"): records for depth, records in results.items()}
    write_report(options, __doc__, table, pictures={"depth": draw(against_depth(drawn))})


def _seconds(records):
    trained = [record for record in records if record["seconds"] is not None]
    return f"{mean(trained, 'seconds'):.0f} s" if trained else "-"
