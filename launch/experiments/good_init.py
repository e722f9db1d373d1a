"""Is a good init enough? Regularizers and modulation from the near-isometric start, a long run."""

import math
import statistics

from orthojax.experiments.arms import LADDER, LONG_SEARCH_STEPS, LONG_STEPS, cifar10, lengthen
from orthojax.experiments.constraint import TIME_CONSTANTS, keep
from orthojax.experiments.report import CELLS, cells, table, write_report
from orthojax.experiments.rivals import L2
from orthojax.experiments.sweep import run_name, tuned
from orthojax.pictures.picture import COLORS, clear_frame, new_picture
from orthojax.storage.metrics import read_metrics

TITLE = "A good init, and what is kept of it"
DEPTH = 44
START = 0.05  # of the ladder
KEPT = ("nothing", "L2", "penalty", "constraint")
MODULATED = {"off": 1e30, "on": 10.0}  # the tolerance: at any, sites measure


def config(options, kept, modulated, rate):
    """The config of an arm at a rate."""
    found = cifar10(DEPTH, "near_isometric", options.preset, options.data_dir)
    lengthen(found, options.preset)
    found.observe_every, found.eval_every = 100, 1_000
    with found.unlocked(), found.ignore_type():
        found.optimizer.learning_rate = rate
        found.modulation.tolerance = MODULATED[modulated]
        keep(found, kept)
        if kept == "L2":
            found.regularizer = L2
    return found


def jobs(options):
    """(what keeps the kernels, modulation) -> job, each at a rate of its own."""
    found = {}
    for modulated in MODULATED:
        for kept in KEPT:

            def at(rate, arm=(kept, modulated)):
                return config(options, *arm, rate)

            found[kept, modulated] = tuned(
                at,
                _directory(options, kept, modulated),
                options.seeds,
                rates=LADDER,
                start=START,
                search_steps=LONG_SEARCH_STEPS[options.preset],
            )
    return found


def _directory(options, kept, modulated):
    return options.workdir / f"{kept}_{modulated}"


def report(options, results):
    """Accuracy at the end; orthonormality and the growth of the error along the run."""
    rows, drawn = [], []
    picture = new_picture(12, 3.8)
    panels = picture.subplots(1, 3)
    for (kept, modulated), records in results.items():
        color, style = COLORS[KEPT.index(kept)], {"off": "-", "on": ":"}[modulated]
        directory, ends = _directory(options, kept, modulated), []
        for seed, record in enumerate(records):
            run = directory / run_name(record["learning_rate"], record["steps"], record["seed"])
            curves = _curves(run)
            drawn += [(run, name, *curve) for name, curve in curves.items()]
            label = f"{kept}, modulation {modulated}"
            for axes, curve in zip(panels, curves.values(), strict=True):
                axes.plot(*curve, color=color, linestyle=style, label=None if seed else label)
            if not record["diverged"]:
                ends.append({name: values[-1] for name, (_, values) in curves.items()})
        rows.append(
            [
                kept,
                modulated,
                *cells(records),
                f"{statistics.fmean(record['train_loss'] for record in records):.3f}",
                *(
                    ", ".join(f"{end[name]:.2g}" for end in ends)
                    for name in ("orthonormality", "growth")
                ),
            ]
        )
    titles = ("test accuracy (%)", "largest ‖WᵀW − I‖/√n", "growth of the error, decades")
    for axes, title in zip(panels, titles, strict=True):
        axes.set(xlabel="training step", title=title)
        clear_frame(axes)
    panels[1].set_yscale("log")
    panels[0].legend(frameon=False, fontsize=7)
    headings = ["kernels kept by", "modulation", *CELLS, "training loss"]
    headings += ["largest ‖WᵀW − I‖/√n at the end", "growth at the end, decades"]
    write_report(
        options,
        TITLE,
        table(headings, rows),
        f"{DEPTH} plain layers from the near-isometric start, {LONG_STEPS[options.preset]:,} steps "
        f"of 128 images of CIFAR-10{', at 16×16, width 8' if options.preset == 'cpu' else ''}; "
        "rate down to 0 along a cosine, gradients clipped to a norm of 1, BN statistics of one "
        "pass over 1,280 training images. The penalty's coefficient is such that an error of "
        f"orthonormality decays by a factor of exp({TIME_CONSTANTS:g}) in the run; L2 has 1e-4. "
        "Each arm has the rate of a ladder, two or three to a factor of ten, with the smallest "
        f"training loss after {LONG_SEARCH_STEPS[options.preset]:,} steps. The growth is the "
        "largest factor between the second moments of the error at a site and at the topmost one, "
        "had nothing rescaled it.",
        pictures={"good_init": picture},
        curves=drawn,
    )


def _curves(workdir):
    """Name -> `(steps, values)`: test accuracy in %, orthonormality, growth in decades."""
    found = {"test": ([], []), "orthonormality": ([], []), "growth": ([], [])}

    def add(name, step, value):
        found[name][0].append(step)
        found[name][1].append(value)

    for metrics in read_metrics(workdir):
        if metrics["kind"] == "test":
            add("test", metrics["step"], 100 * metrics["accuracy"])
        elif metrics["kind"] == "layers":
            add("orthonormality", metrics["step"], metrics["orthonormality_error"])
            add("growth", metrics["step"], metrics["log_growth"] / math.log(10))
    return found
