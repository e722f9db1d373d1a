"""Plain against residual in a long run: who stays behind, and on training or on test images?"""

import functools
import statistics

from orthojax.experiments.arms import (
    LADDER,
    LONG_SEARCH_STEPS,
    LONG_STEPS,
    cifar10,
    lengthen,
    paper_coefficient,
)
from orthojax.experiments.report import accuracy, table, write_report
from orthojax.experiments.sweep import run_name, tuned
from orthojax.pictures.picture import COLORS, clear_frame, new_picture
from orthojax.storage.metrics import read_metrics

TITLE = "Plain against residual, a long run"
DEPTHS = (44, 110)
METHODS = {
    "near_isometric": "plain, near-isometric",
    "residual": "residual, He + L2",
    "paper": "plain, the paper's start, modulated",
    "baseline": "plain, He + L2",
}
STARTS = {"near_isometric": 0.05, "residual": 0.2, "paper": 0.1, "baseline": 0.1}  # of the ladder
# From He's start nets of 110 layers are at chance after the search, at any rate: they have the rate
# of 44 layers, which is also that of Table 2, where the search takes 3,000 steps.
LADDERS = {"l2,110": (0.1,)}


def jobs(options):
    """Width 16, rate down to 0 along a cosine, gradients clipped; one seed at 110 layers."""
    return {
        f"{method},{depth}": tuned(
            functools.partial(config, options, method, depth),
            _directory(options, method, depth),
            options.seeds if depth == DEPTHS[0] else options.seeds[:1],
            rates=LADDERS.get(f"{method},{depth}", LADDER),
            start=STARTS[method],
            search_steps=LONG_SEARCH_STEPS[options.preset],
        )
        for depth in DEPTHS
        for method in METHODS
    }


def config(options, method, depth, rate):
    """The config of a net at a rate, its coefficient such that λ Σ η is the paper's."""
    found = cifar10(depth, method, options.preset, options.data_dir)
    lengthen(found, options.preset)
    found.model.width, found.eval_every = 16, 500
    found.optimizer.learning_rate = rate
    found.regularizer.coefficient = paper_coefficient(rate, found.steps)
    if method == "paper":
        with found.ignore_type():
            found.modulation.steps = None
    return found


def _directory(options, method, depth):
    return options.workdir / f"{method}{depth}"


def report(options, results):
    """Accuracy on training and test images along the run, and at its end."""
    rows, drawn = [], []
    depths = [d for d in DEPTHS if any(f"{method},{d}" in results for method in METHODS)]
    picture = new_picture(0.5 + 4.5 * len(depths), 3.8)
    panels = picture.subplots(1, len(depths), squeeze=False, sharey=True)[0]
    for axes, depth in zip(panels, depths, strict=True):
        for color, (method, label) in zip(COLORS, METHODS.items(), strict=False):
            records = results.get(f"{method},{depth}")
            if records is None:
                continue
            directory, on_training = _directory(options, method, depth), []
            for seed, record in enumerate(records):
                run = directory / run_name(record["learning_rate"], record["steps"], record["seed"])
                curves = _curves(run)
                drawn += [(run, name, *curve) for name, curve in curves.items()]
                _draw(axes, curves, color, None if seed else label)
                on_training.append(statistics.fmean(curves["train"][1][-8:]))
            rows.append(
                [
                    depth,
                    label,
                    f"{records[0]['learning_rate']:g}",
                    accuracy(records),
                    ", ".join(f"{value:.1f}" for value in on_training),
                    len(records),
                ]
            )
        axes.set(title=f"{depth} layers", xlabel="training step")
        clear_frame(axes)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("accuracy (%)")
    headings = ["layers", "net", "learning rate", "test accuracy (%)", "on training images", "n"]
    write_report(
        options,
        TITLE,
        table(headings, rows),
        f"{LONG_STEPS[options.preset]:,} steps of 128 images of CIFAR-10, at "
        f"{'16×16' if options.preset == 'cpu' else '32×32'}; width 16, horizontal flips only, rate "
        "down to 0 along a cosine, gradients clipped to a norm of 1, BN statistics of one pass "
        "over 1,280 training images. Each net has the rate of a ladder, two or three to a factor "
        f"of ten, with the smallest training loss after {LONG_SEARCH_STEPS[options.preset]:,} "
        "steps, but for He's start at 110 layers, which learns nothing in so few and has "
        f"{LADDERS['l2,110'][0]:g}. Coefficients, of penalties as of L2, are such that λ Σ η is "
        "the paper's. In the picture test images have markers and training images none; in the "
        "table the latter are the mean of the last 400 steps, each seed.",
        pictures={"long_run": picture},
        curves=drawn,
    )


def _curves(workdir):
    """Kind -> `(steps, accuracy in %)`: on training images, and on test images."""
    found = {"train": ([], []), "test": ([], [])}
    for metrics in read_metrics(workdir):
        if metrics["kind"] in found:
            steps, values = found[metrics["kind"]]
            steps.append(metrics["step"])
            values.append(100 * metrics["accuracy"])
    return found


def _draw(axes, curves, color, label):
    axes.plot(*curves["train"], color=color, linewidth=0.6, alpha=0.6)
    axes.plot(*curves["test"], color=color, marker="o", markersize=3, label=label)
