"""Plain against residual, a long run: who stays behind, and on training or on test images?

8,000 steps of 128 images of CIFAR-10 at 16×16 (preset `full`: 64,000 at 32×32); width 16,
horizontal flips only, rate down to 0 along a cosine, gradients clipped to a norm of 1, BN
statistics of one pass over 1,280 training images. Each net has the rate of a ladder, two or three
to a factor of ten, with the smallest training loss after 600 steps (4,000), but for He's start at
110 layers, which learns nothing in so few and has 0.1. Coefficients, of penalties as of L2, are
such that λ Σ η is the paper's. In the picture test images have markers and training images none; in
the table the latter are the mean of the last eight records, each seed.
"""

import functools
import itertools
import statistics

from orthojax.experiments import arms
from orthojax.experiments.report import arms_table, curve, draw, lines_of, write_report
from orthojax.experiments.sweep import LADDER, tuned

DEPTHS = (44, 110)
METHODS = {  # with where the search for a rate begins
    "near_isometric": ("plain, near-isometric", 0.05),
    "residual": ("residual, He + L2", 0.2),
    "paper": ("plain, the paper's start, modulated", 0.1),
    "baseline": ("plain, He + L2", 0.1),
}
# From He's start nets of 110 layers are at chance after the search, at any rate: they have the rate
# of 44 layers, which is also that of Table 2, where the search takes 3,000 steps.
LADDERS = {("baseline", 110): (0.1,)}
ON_TRAINING = "on training images"


def config(options, method, depth, rate):
    """The config of a net at a rate, its coefficient such that λ Σ η is the paper's."""
    long = {**arms.lengthened(options), "model.width": 16, "eval_every": 500}
    own = {"modulation.steps": None} if method == "paper" else {}
    own["optimizer.learning_rate"] = rate
    found = arms.cifar10(options, depth, method, long, own)
    found.regularizer.coefficient = arms.coefficient(found)
    return found


def jobs(options):
    """(method, depth) -> job; one seed at 110 layers."""
    found = {}
    for depth, method in itertools.product(DEPTHS, METHODS):
        directory, seeds = options.arm(f"{method}{depth}")
        found[method, depth] = tuned(
            functools.partial(config, options, method, depth),
            directory,
            seeds if depth == DEPTHS[0] else seeds[:1],
            rates=LADDERS.get((method, depth), LADDER),
            start=METHODS[method][1],
            search_steps=arms.LONG_SEARCH_STEPS[options.preset],
        )
    return found


def report(options, results):
    """Accuracy on training and test images along the run, and at its end."""
    panels = {depth: {} for _, depth in results}
    for (method, depth), records in results.items():
        panels[depth][METHODS[method][0]] = records
    marked, thin = {"marker": "o", "markersize": 3}, {"linewidth": 0.6, "alpha": 0.6}
    axes = {"xlabel": "training step", "ylabel": "accuracy (%)"}
    drawn = [
        (
            lines_of(nets, "test", **marked) + lines_of(nets, "train", **thin),
            {"title": f"{depth} layers", **axes},
        )
        for depth, nets in panels.items()
    ]
    found = {(depth, net): runs for depth, nets in panels.items() for net, runs in nets.items()}
    headings = ["layers", "net", "learning rate", "test accuracy (%)", ON_TRAINING, "n"]
    write_report(
        options,
        __doc__,
        arms_table(headings, found, **{ON_TRAINING: _on_training}),
        pictures={"long_run": draw(*drawn, sharey=True)},
        results=results,
        curves={"train": ("train",), "test": ("test",)},
    )


def _on_training(records):
    ends = [values[-8:] for _, values in (curve(record, "train") for record in records)]
    return ", ".join(f"{statistics.fmean(end):.1f}" for end in ends if end)
