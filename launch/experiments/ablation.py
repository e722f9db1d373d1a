"""What matters: one factor of the recipe at a time, each arm at a learning rate of its own.

150 steps of 128 images, width 8; the recipe is `method=near_isometric`. One factor is varied at a
time, except for BN bias and kernel, which are crossed. Each arm has the learning rate with the
smallest training loss of the first seed.
"""

import itertools

from orthojax.experiments import arms
from orthojax.experiments.report import arms_table, bars, save_picture, write_report
from orthojax.experiments.sweep import over_seeds, tuned

STEPS = 150
HIGH_RATE = 0.02
# A growth of 130, where the search began; that of the configs, which came out of it, is 6.8.
CIFAR10_BIAS = {44: 1.0, 110: 1.55}
# (data set, depth) -> where the search for a rate begins, and the factors; cost decides which.
BENCHES = {
    ("digits", 20): (0.02, ("bias alone", "rest")),
    ("digits", 44): (0.01, ("bias", "regularizer", "modulation")),
    ("digits", 110): (0.01, ("bias", "rest")),
    ("digits", 302): (0.002, ("extremes",)),
    ("cifar10", 44): (0.02, ("bias alone", "rest")),
    ("cifar10", 110): (0.005, ("extremes",)),
}


def factors(recipe_bias):
    """Factor -> level -> changes of the recipe, whose own BN bias is among those tried."""
    return {
        "bias": {
            f"{kernel}, bias {bias:g}": {"model.kernel_init": kernel, "model.bn_bias": bias}
            for kernel in ("delta_orthonormal", "orthonormal")
            for bias in (0.0, 0.5, 1.0, recipe_bias, 2.0)
        },
        "bias alone": {
            f"bias {bias:g}": {"model.bn_bias": bias} for bias in (0.0, 0.5, 1.0, 1.5, 2.0)
        },
        "regularizer": {
            "none": arms.NO_REGULARIZER,
            "L2 1e-4": arms.L2,
            **{
                f"ortho {coefficient:g}": {"regularizer.coefficient": coefficient}
                for coefficient in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
            },
        },
        "modulation": {
            "always": {},
            "off": arms.UNMODULATED,
            "first 10 %": {"modulation.steps": STEPS // 10},
            "tolerance 1": {"modulation.tolerance": 1.0},
            "tolerance 10,000": {"modulation.tolerance": 1e4},
        },
        "rest": {
            "recipe": {},
            "no regularizer": arms.NO_REGULARIZER,
            "L2 1e-4": arms.L2,
            "ortho 1e-2": {"regularizer.coefficient": 1e-2},
            "modulation off": arms.UNMODULATED,
        },
        "extremes": {
            "recipe": {},
            "bias 0": {"model.bn_bias": 0.0},
            "bias 2": {"model.bn_bias": 2.0},
            "no regularizer": arms.NO_REGULARIZER,
            "modulation off": arms.UNMODULATED,
        },
    }


# Modulation at 110 layers at four times the rate that is best there: level -> directory, changes.
AT_HIGH_RATE = {
    "always": ("recipe", {}),
    "off": ("rest=modulation_off", arms.UNMODULATED),
    "first 10 %": ("first", {"modulation.steps": STEPS // 10}),
}


def jobs(options):
    """(data set, depth, factor, level) -> job; the recipe is a level of every factor, run once."""
    found = {}
    for level, (name, changes) in AT_HIGH_RATE.items():
        fast = {"optimizer.learning_rate": HIGH_RATE, **changes}
        made = arms.near_isometric(options, "digits", 110, STEPS, fast)
        factor = f"modulation at rate {HIGH_RATE:g}"
        place = options.workdir / "digits_110" / name, options.seeds
        found["digits", 110, factor, level] = over_seeds(made, *place)
    for (dataset, depth), (start, names) in BENCHES.items():
        bias = {"model.bn_bias": CIFAR10_BIAS[depth]} if dataset == "cifar10" else {}
        recipe = arms.near_isometric(options, dataset, depth, STEPS, bias)
        tables = factors(recipe.model.bn_bias)
        for factor in names:
            for level, changes in tables[factor].items():
                made = arms.changed(recipe, changes)
                name = f"{factor}={level}".replace(" ", "_") if made != recipe else "recipe"
                place = options.workdir / f"{dataset}_{depth}" / name, options.seeds
                found[dataset, depth, factor, level] = tuned(made, *place, start=start)
    return found


def report(options, results):
    """A table and a picture for each factor of each data set and depth."""
    parts, columns = [], ("test accuracy (%)", "training loss", "learning rate", "n")
    for (dataset, depth, factor), names in itertools.groupby(results, key=lambda arm: arm[:3]):
        levels = {arm[3]: results[arm] for arm in names}
        picture = bars({"": {level: {"": records} for level, records in levels.items()}})
        name = f"{dataset}_{depth}_{factor}".replace(" ", "_")
        table, shown = arms_table([factor, *columns], levels), save_picture(options, name, picture)
        parts += [f"## {dataset}, {depth} layers: {factor}", table, shown]
    write_report(options, __doc__, *parts)
