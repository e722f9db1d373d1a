"""A good init, and what is kept of it: is the near-isometric start enough in a long run?

44 plain layers on CIFAR-10, 8,000 steps of 128 images at 16×16 and width 8 (preset `full`: 64,000
at 32×32 and width 16); rate down to 0 along a cosine, gradients clipped to a norm of 1, BN
statistics of one pass over 1,280 training images. The penalty's coefficient is such that an error
of orthonormality decays by a factor of exp(3) in the run; L2 has 1e-4. Each arm has the rate of a
ladder, two or three to a factor of ten, with the smallest training loss after 600 steps (4,000).
Orthonormality and growth in the table are those at the end. The growth is the largest factor
between the second moments of the error at a site and at the topmost one, had nothing rescaled it.
"""

import functools
import itertools
import math

from orthojax.experiments import arms
from orthojax.experiments.report import CELLS, arms_table, curve, draw, lines_of, write_report
from orthojax.experiments.sweep import tuned
from orthojax.pictures.picture import COLORS

KEPT = ("nothing", "L2", "penalty", "constraint")
MODULATED = {"off": 1e30, "on": 10.0}  # the tolerance: at any, sites measure
CURVES = {
    "test": ("test",),
    "orthonormality": ("layers", "orthonormality_error"),
    "growth": ("layers", "log_growth", 1 / math.log(10)),
}
TITLES = ("test accuracy (%)", "largest ‖WᵀW − I‖/√n", "growth of the error, decades")


def config(options, kept, modulated, rate):
    """The config of an arm at a rate."""
    long = {**arms.lengthened(options), "observe_every": 100, "eval_every": 1_000}
    own = {"optimizer.learning_rate": rate, "modulation.tolerance": MODULATED[modulated]}
    found = arms.cifar10(options, 44, "near_isometric", long, own)
    return arms.changed(found, arms.L2) if kept == "L2" else arms.kept(found, kept)


def jobs(options):
    """(what keeps the kernels, modulation) -> job, each at a rate of its own."""
    return {
        (kept, modulated): tuned(
            functools.partial(config, options, kept, modulated),
            *options.arm(kept, modulated),
            start=0.05,
            search_steps=arms.LONG_SEARCH_STEPS[options.preset],
        )
        for modulated, kept in itertools.product(MODULATED, KEPT)
    }


def report(options, results):
    """Accuracy at the end; orthonormality and the growth of the error along the run."""
    panels = []
    for title, place in zip(TITLES, CURVES.values(), strict=True):
        axes = {"title": title, "xlabel": "training step"}
        axes["yscale"] = "log" if place == CURVES["orthonormality"] else "linear"
        lines = []
        for (kept, modulated), records in results.items():
            style = {"color": COLORS[KEPT.index(kept)], "linestyle": "-:"[modulated == "on"]}
            lines += lines_of({f"{kept}, modulation {modulated}": records}, *place, **style)
        panels.append((lines, axes))
    headings = ["kernels kept by", "modulation", *CELLS, "training loss", *TITLES[1:]]
    ends = {TITLES[1]: _ends("orthonormality"), TITLES[2]: _ends("growth")}
    table = arms_table(headings, results, **ends)
    picture = draw(*panels, width=4)
    write_report(
        options, __doc__, table, pictures={"good_init": picture}, results=results, curves=CURVES
    )


def _ends(name):
    """A column: the last value of a curve of every run that did not diverge."""

    def ends(records):
        curves = [curve(record, *CURVES[name]) for record in records if not record["diverged"]]
        return ", ".join(f"{values[-1]:.2g}" for _, values in curves)

    return ends
