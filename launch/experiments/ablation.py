"""What of the recipe matters: one factor at a time, each arm at a learning rate of its own."""

import itertools
import statistics

from orthojax.experiments.arms import LADDER, cifar10, digits
from orthojax.experiments.report import accuracy, save_picture, table, write_report
from orthojax.experiments.sweep import over_seeds, tuned
from orthojax.pictures.picture import COLORS, clear_frame, new_picture

TITLE = "What matters: one factor at a time"
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


def bias_and_kernel(config):
    """BN bias at initialization, the recipe's solved one among them, for both kernels."""
    for kernel, bias in itertools.product(
        ("delta_orthonormal", "orthonormal"), (0.0, 0.5, 1.0, config.model.bn_bias, 2.0)
    ):
        yield f"{kernel}, bias {bias:g}", {"model.kernel_init": kernel, "model.bn_bias": bias}


def regularizer(config):
    """None, L2, and the orthonormality penalty over four decades."""
    del config
    yield "none", {"regularizer": {"name": "none"}}
    yield "L2 1e-4", {"regularizer": {"name": "l2", "coefficient": 1e-4}}
    for coefficient in (1e-5, 1e-4, 1e-3, 1e-2, 1e-1):
        yield f"ortho {coefficient:g}", {"regularizer.coefficient": coefficient}


def modulation(config):
    """When, and from what mismatch on."""
    yield "always", {}
    yield "off", {"modulation": None}
    yield "first 10 %", {"modulation.steps": config.steps // 10}
    yield "tolerance 1", {"modulation.tolerance": 1.0}
    yield "tolerance 10,000", {"modulation.tolerance": 1e4}


def bias_alone(config):
    """BN bias at initialization, delta-orthonormal kernels."""
    del config
    for bias in (0.0, 0.5, 1.0, 1.5, 2.0):
        yield f"bias {bias:g}", {"model.bn_bias": bias}


def rest(config):
    """The extremes of regularizer and modulation."""
    del config
    yield "recipe", {}
    yield "no regularizer", {"regularizer": {"name": "none"}}
    yield "L2 1e-4", {"regularizer": {"name": "l2", "coefficient": 1e-4}}
    yield "ortho 1e-2", {"regularizer.coefficient": 1e-2}
    yield "modulation off", {"modulation": None}


def extremes(config):
    """The recipe, without each of its parts, and with a bias of 2: where a run is dear."""
    del config
    yield "recipe", {}
    yield "bias 0", {"model.bn_bias": 0.0}
    yield "bias 2", {"model.bn_bias": 2.0}
    yield "no regularizer", {"regularizer": {"name": "none"}}
    yield "modulation off", {"modulation": None}


FACTORS = {
    "bias": bias_and_kernel,
    "regularizer": regularizer,
    "modulation": modulation,
    "bias alone": bias_alone,
    "rest": rest,
    "extremes": extremes,
}


def the_recipe(options, dataset, depth):
    """The config that the arms of a data set and depth are changes of."""
    if dataset == "digits":
        return digits(depth, "near_isometric", STEPS)
    config = cifar10(depth, "near_isometric", "cpu", options.data_dir)
    config.steps = config.eval_every = config.checkpoint_every = STEPS
    config.model.bn_bias = CIFAR10_BIAS[depth]
    return config


def at_a_high_rate(options):
    """Modulation at 110 layers at four times the rate that is best there, every seed."""
    levels = {
        "always": ("recipe", {}),
        "off": ("rest=modulation_off", {"modulation": None}),
        "first 10 %": ("first", {"modulation.steps": STEPS // 10}),
    }
    found = {}
    for level, (name, changes) in levels.items():
        config = changed(digits(110, "near_isometric", STEPS), changes)
        config.optimizer.learning_rate = HIGH_RATE
        directory = options.workdir / "digits_110" / name
        factor = f"modulation at rate {HIGH_RATE:g}"
        found["digits", 110, factor, level] = over_seeds(config, directory, options.seeds)
    return found


def changed(recipe, changes):
    """A copy of a config with `section.key` -> value set."""
    config = recipe.copy_and_resolve_references()
    with config.ignore_type():
        for key, value in changes.items():
            section, _, name = key.rpartition(".")
            (config[section] if section else config)[name] = value
    return config


def jobs(options):
    """(data set, depth, factor, level) -> job; the recipe is a level of every factor, run once."""
    found = at_a_high_rate(options)
    for (dataset, depth), (start, factors) in BENCHES.items():
        recipe = the_recipe(options, dataset, depth)
        for factor in factors:
            for level, changes in FACTORS[factor](recipe):
                config = changed(recipe, changes)
                name = f"{factor}={level}".replace(" ", "_")
                name = "recipe" if config.to_json() == recipe.to_json() else name
                directory = options.workdir / f"{dataset}_{depth}" / name
                found[dataset, depth, factor, level] = tuned(
                    config, directory, options.seeds, rates=LADDER, start=start
                )
    return found


def report(options, results):
    """A table and a picture for each factor of each data set and depth."""
    parts, rows = [], {}
    for (dataset, depth, factor, level), records in results.items():
        rows.setdefault((dataset, depth, factor), []).append((level, records))
    for (dataset, depth, factor), levels in rows.items():
        cells = [
            [
                level,
                accuracy(records),
                f"{statistics.fmean(record['train_loss'] for record in records):.3f}",
                f"{records[0]['learning_rate']:g}",
                len(records),
            ]
            for level, records in levels
        ]
        headings = [factor, "test accuracy (%)", "training loss", "learning rate", "n"]
        heading = f"{dataset}, {depth} layers: {factor}"
        name = f"{dataset}_{depth}_{factor}".replace(" ", "_")
        picture = save_picture(options, name, _draw(heading, levels))
        parts += [f"## {heading}", table(headings, cells), picture]
    write_report(
        options,
        TITLE,
        f"{STEPS} steps of 128 images, width 8; the recipe is `method=near_isometric`. One factor "
        "is varied at a time, except for BN bias and kernel, which are crossed. Each arm has the "
        "learning rate with the smallest training loss of the first seed.",
        *parts,
    )


def _draw(heading, levels):
    picture = new_picture(6, 0.6 + 0.3 * len(levels))
    axes = picture.subplots()
    for place, (_, records) in enumerate(levels):
        values = [100 * record["test_accuracy"] for record in records]
        axes.barh(place, statistics.fmean(values), color=COLORS[5])
        axes.plot(values, [place] * len(values), "k.", markersize=4)
    axes.set_yticks(range(len(levels)), [level for level, _ in levels])
    axes.set(xlabel="test accuracy (%)", xlim=(0, 100))
    axes.set_title(heading, fontsize=10)
    axes.invert_yaxis()
    clear_frame(axes)
    return picture
