"""Kernels kept orthonormal by a constraint, by a penalty, or not: what training makes of it."""

import statistics

from orthojax.experiments.arms import LADDER, cifar10, clip, digits, folder
from orthojax.experiments.report import CELLS, cells, table, write_report
from orthojax.experiments.sweep import tuned
from orthojax.pictures.picture import COLORS, clear_frame, new_picture

TITLE = "Penalty, constraint, or neither"
STEPS = 600
TIME_CONSTANTS = 3.0  # of the penalty, that a run lasts
# Most important first, so an interrupted run is still useful.
BENCHES = (("digits", 44), ("digits", 110), ("cifar10", 44), ("cifar10", 110))
STARTS = {"the paper's start": 0.1, "near-isometric": 0.05}  # where the search for a rate begins
ARMS = ("neither", "penalty", "constraint")


def coefficient(rate, steps, momentum):
    """λ with which an error of orthonormality decays by `exp(-TIME_CONSTANTS)` in the run.

    It decays with `4 λ Σ η / (1 - momentum)`, and Σ η is `rate * steps / 2`, the rate falling
    to 0 linearly or along a cosine.
    """
    return TIME_CONSTANTS * (1 - momentum) / (4 * rate * steps / 2)


def keep(config, by):
    """Has the kernels of a config kept orthonormal: by `penalty`, by `constraint`, or else not."""
    config.regularizer = {"name": "none"}
    if by == "penalty":
        sgd = config.optimizer
        strength = coefficient(sgd.learning_rate, config.steps, sgd.momentum)
        config.regularizer = {"name": "ortho", "coefficient": strength}
    elif by == "constraint":
        config.constraint = {"method": "polar"}


def config(dataset, depth, start, arm, rate, data_dir=None):
    """The config of an arm at a rate."""
    if dataset == "digits":
        found = digits(depth, "near_isometric", STEPS)
    else:
        found = cifar10(depth, "near_isometric", "cpu", data_dir)
        found.steps = STEPS
    clip(found)
    found.eval_every = found.checkpoint_every = STEPS // 2
    found.observe_every = STEPS // 6
    with found.unlocked(), found.ignore_type():
        found.schedule = {"name": "linear", "warmup_steps": 20}
        found.optimizer.learning_rate = rate
        keep(found, arm)
        if start == "near-isometric":
            found.modulation = None
        else:
            found.model.kernel_init, found.model.bn_bias = "orthonormal", 0.0
    return found


def jobs(options):
    """`data set, layers, start, arm` -> job, each at a rate of its own."""
    found = {}
    for dataset, depth in BENCHES:
        if dataset == "cifar10" and not options.data_dir:
            continue
        for start, first in STARTS.items():
            for arm in ARMS:

                def at(rate, case=(dataset, depth, start, arm)):
                    return config(*case, rate, options.data_dir)

                name = folder(dataset, depth, start, arm)
                found[dataset, depth, start, arm] = tuned(
                    at, options.workdir / name, options.seeds, rates=LADDER, start=first
                )
    return found


def report(options, results):
    """Accuracy, training loss and orthonormality of every arm."""
    rows = []
    for (dataset, depth, start, arm), records in results.items():
        errors = [record["orthonormality_error"] for record in records if not record["diverged"]]
        rows.append(
            [
                dataset,
                depth,
                start,
                arm,
                *cells(records),
                f"{statistics.fmean(record['train_loss'] for record in records):.3f}",
                f"{max(errors):.1e}" if errors else "",
            ]
        )
    headings = ["data", "layers", "start", "kept orthonormal by", *CELLS]
    headings += ["training loss", "largest ‖WᵀW − I‖/√n"]
    write_report(
        options,
        TITLE,
        table(headings, rows),
        f"{STEPS} steps of 128 images, width 8, CIFAR-10 at 16×16; SGD with momentum 0.9, the "
        "gradient clipped to a norm of 1, the rate falling linearly to 0, BN statistics of one "
        "pass over 1,280 training images. The paper's start is modulated, the near-isometric one "
        "is not. The penalty's coefficient is such that an error of orthonormality decays by a "
        f"factor of exp({TIME_CONSTANTS:g}) in the run. Each arm has the rate with the least "
        "training loss of the first seed, from a ladder of two or three to a factor of ten.",
        pictures={"constraint": _draw(results)} if results else None,
    )


def _draw(results):
    groups = list(dict.fromkeys(key[:3] for key in results))
    picture = new_picture(8, 0.8 + 0.6 * len(groups))
    axes = picture.subplots()
    for place, group in enumerate(groups):
        for offset, (arm, color) in enumerate(zip(ARMS, COLORS, strict=False)):
            records = results.get((*group, arm))
            if records is None:
                continue
            values = [100 * record["test_accuracy"] for record in records]
            at = place + 0.25 * (offset - 1)
            label = arm if place == 0 else None
            axes.barh(at, statistics.fmean(values), 0.22, color=color, label=label)
            axes.plot(values, [at] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(groups)), [f"{d}, {n} layers, {start}" for d, n, start in groups])
    axes.set(xlabel="test accuracy (%)", xlim=(0, 100))
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(ARMS))
    clear_frame(axes)
    return picture
