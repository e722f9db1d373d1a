"""Penalty, constraint, or neither: kernels kept orthonormal, and what training makes of it.

600 steps of 128 images, width 8, CIFAR-10 at 16×16; SGD with momentum 0.9, the gradient clipped to
a norm of 1, the rate falling linearly to 0, BN statistics of one pass over 1,280 training images.
The paper's start is modulated, the near-isometric one is not. The penalty's coefficient is such
that an error of orthonormality decays by a factor of exp(3) in the run. Each arm has the rate with
the smallest training loss of the first seed, from a ladder of two or three to a factor of ten.
"""

import functools
import itertools

from orthojax.experiments import arms
from orthojax.experiments.report import CELLS, arms_table, bars, write_report
from orthojax.experiments.sweep import tuned

STEPS = 600
# Most important first, so an interrupted run is still useful.
BENCHES = (("digits", 44), ("digits", 110), ("cifar10", 44), ("cifar10", 110))
# Start -> changes of the near-isometric net, and where the search for a rate begins.
STARTS = {
    "the paper's start": (arms.PAPER_START, 0.1),
    "near-isometric": (arms.UNMODULATED, 0.05),
}
KEPT_BY = ("neither", "penalty", "constraint")
SCHEDULE = {"schedule": {"name": "linear", "warmup_steps": 20}, "observe_every": STEPS // 6}
ERROR = "largest ‖WᵀW − I‖/√n"


def config(options, dataset, depth, start, by, rate):
    """The config of an arm at a rate."""
    changes = {**arms.CLIPPED, **SCHEDULE, **arms.saved_every(STEPS // 2), **STARTS[start][0]}
    changes["optimizer.learning_rate"] = rate
    return arms.kept(arms.near_isometric(options, dataset, depth, STEPS, changes), by)


def jobs(options):
    """(data set, layers, start, what keeps the kernels) -> job, each at a rate of its own."""
    names = [
        (*bench, start, by) for bench, start, by in itertools.product(BENCHES, STARTS, KEPT_BY)
    ]
    return {
        arm: tuned(
            functools.partial(config, options, *arm), *options.arm(*arm), start=STARTS[arm[2]][1]
        )
        for arm in names
        if options.data_dir or arm[0] == "digits"
    }


def report(options, results):
    """Accuracy, training loss and orthonormality of every arm."""
    rows = {}
    for (dataset, depth, start, by), records in results.items():
        rows.setdefault(f"{dataset}, {depth} layers, {start}", {})[by] = records
    headings = ["data", "layers", "start", "kept orthonormal by", *CELLS, "training loss", ERROR]
    table = arms_table(headings, results, **{ERROR: _largest_error})
    write_report(options, __doc__, table, pictures={"constraint": bars({"": rows})})


def _largest_error(records):
    errors = [record["orthonormality_error"] for record in records if not record["diverged"]]
    return f"{max(errors):.1e}" if errors else ""
