"""What modulation does for the paper's own start: Gram-Schmidt kernels, BN bias 0."""

import statistics

from orthojax.configs import digits_modulated
from orthojax.experiments.arms import LADDER, digits, folder, paper_coefficient
from orthojax.experiments.report import CELLS, cells, table, write_report
from orthojax.experiments.sweep import over_seeds, tuned
from orthojax.pictures.picture import COLORS, clear_frame, new_picture

TITLE = "Modulation from the paper's start, on the digits"
STEPS = {20: 600, 44: 600, 62: 600, 110: 3_000, 302: 3_000}
SEARCHED = (20, 44, 62)  # depths at which every arm finds its own rate
DROP = {"name": "step_decay", "warmup_steps": 20, "boundaries": (0.5,), "factor": 0.1}
DROPPED = {  # arms whose rate drops
    "the first 300 steps, then a tenth of the rate": {"steps": 300},
    "throughout, from step 300 at a tenth of the rate": {},
}
ARMS = {
    "modulated": {"tolerance": 10.0},
    "tolerance 1": {"tolerance": 1.0},
    "tolerance 10,000": {"tolerance": 1e4},
    "the first 60 steps": {"steps": 60},
    "the first 300 steps": {"steps": 300},
    **DROPPED,
    "normalized error": {"tolerance": 1.0, "reference": 1.0},
    "off": None,
}
# LARS's rates are the relative change of a layer per step.
LARS = {"name": "lars", "learning_rate": 0.005, "momentum": 0.9, "trust_coefficient": 1.0}
RIVALS = ("normalized error", "LARS")
# From the near-isometric start, whose error does not explode: at its best rate, and at four times.
ISOMETRIC_STEPS = 300
ISOMETRIC = {
    f"near-isometric{times}, {modulated}": (rate, modulated == "modulated")
    for times, rate in (("", 0.01), (" at 4 times the rate", 0.04))
    for modulated in ("modulated", "off")
}
STRONG = ", strong regularizer"  # λ Σ η is the paper's
# Most important first, so an interrupted run is still useful.
ORDER = (
    (110, "modulated"),
    *((depth, arm) for depth in SEARCHED[::-1] for arm in ("modulated", "off", "SGD + L2")),
    *((110, arm) for arm in ("off", "SGD + L2", *ISOMETRIC)),
    (62, "tolerance 1"),
    (62, "tolerance 10,000"),
    (62, "the first 60 steps"),
    (62, "the first 300 steps"),
    *((62, arm) for arm in DROPPED),
    *((depth, arm) for depth in (62, 44) for arm in RIVALS),
    *((110, arm) for arm in RIVALS),
    *((110, f"{arm}{STRONG}") for arm in ("modulated", "off", "SGD + L2")),
    (302, "modulated"),
)


def config(depth, arm):
    """The config of an arm; all have the same schedule, a rate that falls linearly to 0."""
    found = digits_modulated.get_config(f"depth={depth},steps={STEPS[depth]}")
    found.eval_every = found.checkpoint_every = STEPS[depth] // 2
    found.mesh.data = 1
    strong, arm = arm.endswith(STRONG), arm.removesuffix(STRONG)
    with found.unlocked(), found.ignore_type():
        if arm == "SGD + L2":
            baseline = digits(depth, "baseline")
            found.model.kernel_init = baseline.model.kernel_init
            found.modulation, found.regularizer = None, baseline.regularizer
        elif arm == "LARS":
            found.modulation, found.optimizer = None, LARS
        elif ARMS[arm] is None:
            found.modulation = None
        else:
            found.modulation.update(ARMS[arm])
        if arm in DROPPED:
            found.schedule = DROP
        if strong:
            rate = found.optimizer.learning_rate
            found.regularizer.coefficient = paper_coefficient(rate, found.steps)
    return found


def isometric(arm):
    """The config of an arm of `ISOMETRIC`, 110 layers."""
    rate, modulated = ISOMETRIC[arm]
    found = digits(110, "near_isometric", ISOMETRIC_STEPS)
    found.optimizer.learning_rate = rate
    with found.ignore_type():
        if not modulated:
            found.modulation = None
    return found


def jobs(options):
    """(depth, arm) -> job. At 110 layers and more, where runs are long, one rate serves all."""
    found = {}
    for depth, arm in ORDER:
        directory = options.workdir / folder(arm, depth)
        if depth in SEARCHED:
            found[depth, arm] = tuned(
                config(depth, arm), directory, options.seeds, rates=LADDER, start=0.05
            )
        else:
            made = isometric(arm) if arm in ISOMETRIC else config(depth, arm)
            found[depth, arm] = over_seeds(made, directory, options.seeds)
    return found


def report(options, results):
    """Accuracy of every arm at every depth, all seeds."""
    rows = [
        [
            depth,
            f"{ISOMETRIC_STEPS if arm in ISOMETRIC else STEPS[depth]:,}",
            arm,
            *cells(records),
        ]
        for (depth, arm), records in sorted(results.items(), key=lambda item: item[0][0])
    ]
    write_report(
        options,
        TITLE,
        table(["layers", "steps", "arm", *CELLS], rows),
        "Width 8, batches of 128, SGD with momentum 0.9, the gradient clipped to a norm of 1, the "
        "rate falling linearly to 0. Up to 62 layers each arm has the rate with the least training "
        "loss of the first seed, from a ladder; from 110 layers on all have the same, and LARS the "
        "one it has at 62. Coefficients are 1e-4, or, of strong regularizers, such that λ Σ η is "
        "the paper's.",
        pictures={"modulation": _draw(results)},
    )


def _draw(results):
    picture = new_picture(5.5, 3.6)
    axes = picture.subplots()
    for arm, color in (("modulated", COLORS[0]), ("off", COLORS[1]), ("SGD + L2", COLORS[2])):
        points = {
            depth: [100 * record["test_accuracy"] for record in records]
            for (depth, name), records in sorted(results.items())
            if name == arm
        }
        means = [statistics.fmean(values) for values in points.values()]
        axes.plot(list(points), means, color=color, label=arm)
        for depth, values in points.items():
            axes.plot([depth] * len(values), values, ".", color=color)
    axes.set(xscale="log", xlabel="layers", ylabel="test accuracy (%)", ylim=(0, 101))
    axes.set_xticks(list(STEPS), [f"{depth}" for depth in STEPS])
    axes.minorticks_off()
    clear_frame(axes)
    axes.legend(frameon=False)
    return picture
