"""Other ways to train nets without shortcuts: each at its own rate, with one budget for all."""

import statistics

from orthojax.experiments.arms import LADDER, MODULATED, cifar10, clip, digits, folder
from orthojax.experiments.report import CELLS, cells, table, write_report
from orthojax.experiments.sweep import tuned
from orthojax.mean_field import critical_tanh, normalized_tanh_scale
from orthojax.pictures.picture import clear_frame, new_picture

TITLE = "Training without shortcuts: everybody's way"
# Most important first, so an interrupted run is still useful.
DEPTHS = {"digits": (110, 44, 302), "cifar10": (44, 110, 302)}
STEPS = {"digits": 300, "cifar10": 600}
BIAS_VARIANCE = 2.01e-5  # that of Xiao et al.'s 10,000 layers
L2 = {"name": "l2", "coefficient": 1e-4}
ORTHO = {"name": "ortho", "coefficient": 1e-4}
NONE = {"name": "none"}
# Where the search for a rate begins: near what was best at 110 layers on each data set.
STARTS = {
    "near-isometric": {"digits": 0.05, "cifar10": 0.02},
    "near-isometric, modulated": {"digits": 0.1, "cifar10": 0.02},
    "the paper's, modulated": {"digits": 0.1, "cifar10": 0.1},
    "residual": {"digits": 0.1, "cifar10": 0.2},
    "residual, last scale 0": {"digits": 0.1, "cifar10": 0.2},
    "BN bias 2": {"digits": 0.05, "cifar10": 0.05},
    "critical tanh": {"digits": 0.05, "cifar10": 0.01},
    "looks-linear": {"digits": 0.1, "cifar10": 0.02},
    "Dirac": {"digits": 0.5, "cifar10": 0.5},
    "ISONet": {"digits": 0.02, "cifar10": 0.02},
    "TAT": {"digits": 0.02, "cifar10": 0.02},
    "DKS": {"digits": 0.01, "cifar10": 0.01},
    "BN, near-linear tanh": {"digits": 0.1, "cifar10": 0.02},
    "backward gradient normalization": {"digits": 0.1, "cifar10": 0.1},
    "LARS": {"digits": 0.005, "cifar10": 0.005},
    "Muon": {"digits": 0.01, "cifar10": 0.005},
}


def _unnormalized(activation, **model):
    return {
        "kernel_init": "delta_orthonormal",
        "norm": "none",
        "activation": activation,
        "bn_bias": 0.0,
        **model,
    }


PAPER = {"kernel_init": "orthonormal", "bn_bias": 0.0}
HE = {"kernel_init": "he", "bn_bias": 0.0}


def _arms(depth):
    """Name -> (the model's changes, other sections)."""
    gain, _ = critical_tanh(BIAS_VARIANCE)
    tanh = {"kernel_gain": gain, "bias_std": BIAS_VARIANCE**0.5}
    near_linear = {
        "kernel_init": "delta_orthonormal",
        "activation": "tanh",
        "bn_bias": 0.0,
        "bn_scale": normalized_tanh_scale(depth - 1),
    }
    modulated = {"modulation": MODULATED}
    normalized = {"modulation": {**MODULATED, "tolerance": 1.0, "reference": 1.0}}
    lars = {"name": "lars", "learning_rate": 0.005, "momentum": 0.9, "trust_coefficient": 1.0}
    muon = {"name": "muon", "learning_rate": 0.005}
    return {
        "near-isometric": ({}, {"regularizer": ORTHO}),
        "near-isometric, modulated": ({}, {"regularizer": ORTHO, **modulated}),
        "the paper's, modulated": (PAPER, {"regularizer": ORTHO, **modulated}),
        "residual": ({"name": "ResNet", **HE}, {"regularizer": L2}),
        "residual, last scale 0": (
            {"name": "ResNet", "zero_init_residual": True, **HE},
            {"regularizer": L2},
        ),
        "BN bias 2": ({**HE, "bn_bias": 2.0}, {"regularizer": L2}),
        "critical tanh": (_unnormalized("tanh", **tanh), {"regularizer": NONE}),
        "looks-linear": (_unnormalized("crelu"), {"regularizer": NONE}),
        "Dirac": ({**HE, "parametrization": "dirac"}, {"regularizer": L2}),
        "ISONet": (_unnormalized("shifted_relu"), {"regularizer": ORTHO}),
        "TAT": (_unnormalized("tailored_relu"), {"regularizer": NONE}),
        "DKS": (_unnormalized("shaped_softplus"), {"regularizer": NONE}),
        "BN, near-linear tanh": (near_linear, {"regularizer": ORTHO}),
        "backward gradient normalization": (PAPER, {"regularizer": ORTHO, **normalized}),
        "LARS": (PAPER, {"regularizer": L2, "optimizer": lars}),
        "Muon": (PAPER, {"regularizer": ORTHO, "optimizer": muon}),
    }


def config(dataset, depth, arm, data_dir=None):
    """The config of an arm; all have the budget, the schedule and clipped gradients in common."""
    if dataset == "digits":
        found = digits(depth, "near_isometric", STEPS[dataset])
    else:
        found = cifar10(depth, "near_isometric", "cpu", data_dir)
        found.steps = STEPS[dataset]
        found.eval_every = found.checkpoint_every = STEPS[dataset] // 4
    model, sections = _arms(depth)[arm]
    clip(found)
    with found.unlocked(), found.ignore_type():
        found.modulation = None
        found.model.update(model)
        for name, section in sections.items():
            found[name] = section
        if found.model.get("norm") == "none":
            del found.model["bn_bias"]
            found.recalibrate_bn = 0
        found.optimizer.learning_rate = STARTS[arm][dataset]
    return found


def jobs(options):
    """`data set, layers, arm` -> job, each at a rate of its own."""
    found = {}
    datasets = ("digits", "cifar10") if options.data_dir else ("digits",)
    for dataset in datasets:
        for depth in DEPTHS[dataset]:
            for arm in _arms(depth):
                made = config(dataset, depth, arm, options.data_dir)
                found[dataset, depth, arm] = tuned(
                    made,
                    options.workdir / folder(dataset, arm, depth),
                    options.seeds,
                    rates=LADDER,
                    start=made.optimizer.learning_rate,
                )
    return found


def report(options, results):
    """Accuracy of every arm at every depth, and against depth."""
    rows, pictures = [], {}
    for dataset in sorted({dataset for dataset, _, _ in results}):
        found = {(depth, arm): r for (name, depth, arm), r in results.items() if name == dataset}
        rows += [
            [dataset, depth, arm, *cells(records)]
            for (depth, arm), records in sorted(
                found.items(), key=lambda item: (item[0][0], -_mean(item[1]))
            )
        ]
        if len({depth for depth, _ in found}) > 1:  # a line needs two points
            pictures[f"rivals_{dataset}"] = _draw(found)
    write_report(
        options,
        TITLE,
        table(["data", "layers", "arm", *CELLS], rows),
        f"{STEPS['digits']:,} steps on the digits, {STEPS['cifar10']:,} on CIFAR-10 at 16×16; "
        "batches of 128, width 8, the gradient clipped to a norm of 1, the rate divided by ten at "
        "half and at three quarters; BN statistics of one pass over 1,280 training images. Each "
        "arm has the rate with the least training loss of the first seed, from a ladder of two or "
        "three to a factor of ten.",
        pictures=pictures,
    )


def _mean(records):
    return 100 * statistics.fmean(record["test_accuracy"] for record in records)


def _draw(found):
    picture = new_picture(7.5, 4.6)
    axes = picture.subplots()
    depths = sorted({depth for depth, _ in found})
    arms = sorted({arm for _, arm in found}, key=lambda arm: -_mean(_deepest(found, arm)))
    for index, arm in enumerate(arms):
        points = {depth: _mean(found[depth, arm]) for depth in depths if (depth, arm) in found}
        style = ("-", "--", ":")[index // 7 % 3]
        ours = arm.startswith("near-isometric")
        axes.plot(
            list(points),
            list(points.values()),
            style,
            marker="o",
            markersize=3,
            linewidth=2.2 if ours else 1.2,
            color=f"C{index % 10}",
            label=arm,
        )
    axes.set(xscale="log", xlabel="layers", ylabel="test accuracy (%)", ylim=(0, None))
    axes.set_xticks(depths, [f"{depth}" for depth in depths])
    axes.minorticks_off()
    clear_frame(axes)
    axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return picture


def _deepest(found, arm):
    return found[max(depth for depth, name in found if name == arm), arm]
