"""Training without shortcuts: everybody's way, each at its own rate, with one budget for all.

300 steps on the digits, 600 on CIFAR-10 at 16×16; batches of 128, width 8, the gradient clipped to
a norm of 1, the rate divided by ten at half and at three quarters; BN statistics of one pass over
1,280 training images. Each arm has the rate with the smallest training loss of the first seed, from
a ladder of two or three to a factor of ten.
"""

import itertools

from orthojax.experiments import arms
from orthojax.experiments.report import CELLS, against_depth, arms_table, draw, mean, write_report
from orthojax.experiments.sweep import tuned
from orthojax.mean_field import critical_tanh, normalized_tanh_scale

# Data -> depths, most important first, so an interrupted run is still useful; steps; and how often
# a run is saved.
BENCHES = {"digits": ((110, 44, 302), 300, 300), "cifar10": ((44, 110, 302), 600, 150)}
BIAS_VARIANCE = 2.01e-5  # that of Xiao et al.'s 10,000 layers
GAIN = critical_tanh(BIAS_VARIANCE)[0]


def unnormalized(activation, **model):
    """Changes: delta-orthonormal kernels, an activation, and no batch normalization."""
    changes = {"norm": "none", "activation": activation, **model}
    return {f"model.{name}": value for name, value in changes.items()}


def near_linear_tanh(depth):
    """Changes: tanh after a batch normalization whose scale makes it nearly linear."""
    scale = normalized_tanh_scale(depth - 1)
    return {"model.activation": "tanh", "model.bn_bias": 0.0, "model.bn_scale": scale}


TANH = unnormalized("tanh", kernel_gain=GAIN, bias_std=BIAS_VARIANCE**0.5)
DIRAC = {**arms.HE_START, "model.parametrization": "dirac"}
NORMALIZED = {"modulation": {"decay": 0.9, "tolerance": 1.0, "reference": 1.0}}
MUON = {"optimizer": {"name": "muon", "learning_rate": 0.005}}
# Arm -> changes of the near-isometric net, unmodulated and with the penalty, or a function of the
# depth; and where the search for a rate begins, on the digits and on CIFAR-10: near what was best
# at 110 layers.
ARMS = {
    "near-isometric": ({}, (0.05, 0.02)),
    "near-isometric, modulated": (arms.MODULATED, (0.1, 0.02)),
    "the paper's, modulated": ({**arms.PAPER_START, **arms.MODULATED}, (0.1, 0.1)),
    "residual": ({**arms.RESIDUAL, **arms.L2}, (0.1, 0.2)),
    "residual, last scale 0": ({**arms.RESIDUAL_LAST_0, **arms.L2}, (0.1, 0.2)),
    "BN bias 2": ({"model.kernel_init": "he", "model.bn_bias": 2.0, **arms.L2}, (0.05, 0.05)),
    "critical tanh": ({**TANH, **arms.NO_REGULARIZER}, (0.05, 0.01)),
    "looks-linear": ({**unnormalized("crelu"), **arms.NO_REGULARIZER}, (0.1, 0.02)),
    "Dirac": ({**DIRAC, **arms.L2}, (0.5, 0.5)),
    "ISONet": (unnormalized("shifted_relu"), (0.02, 0.02)),
    "TAT": ({**unnormalized("tailored_relu"), **arms.NO_REGULARIZER}, (0.02, 0.02)),
    "DKS": ({**unnormalized("shaped_softplus"), **arms.NO_REGULARIZER}, (0.01, 0.01)),
    "BN, near-linear tanh": (near_linear_tanh, (0.1, 0.02)),
    "backward gradient normalization": ({**arms.PAPER_START, **NORMALIZED}, (0.1, 0.1)),
    "LARS": ({**arms.PAPER_START, **arms.L2, **arms.LARS}, (0.005, 0.005)),
    "Muon": ({**arms.PAPER_START, **MUON}, (0.01, 0.005)),
}


def config(options, dataset, depth, arm):
    """The config of an arm; all have the budget, the schedule and clipped gradients in common."""
    changes, starts = ARMS[arm]
    changes = changes(depth) if callable(changes) else changes
    _, steps, every = BENCHES[dataset]
    common = {**arms.CLIPPED, **arms.saved_every(every), **arms.UNMODULATED, **arms.ORTHO}
    rate = {"optimizer.learning_rate": starts[list(BENCHES).index(dataset)]}
    return arms.near_isometric(options, dataset, depth, steps, common, changes, rate)


def jobs(options):
    """(data set, layers, arm) -> job, each at a rate of its own."""
    found = {}
    for dataset in BENCHES if options.data_dir else ("digits",):
        for depth, arm in itertools.product(BENCHES[dataset][0], ARMS):
            made = config(options, dataset, depth, arm)
            found[dataset, depth, arm] = tuned(made, *options.arm(dataset, arm, depth))
    return found


def report(options, results):
    """Accuracy of every arm at every depth, and against depth."""

    def order(arm):
        return *arm[:2], -mean(results[arm], "test_accuracy")

    ordered = {arm: results[arm] for arm in sorted(results, key=order)}
    pictures = {}
    for dataset in dict.fromkeys(dataset for dataset, _, _ in ordered):
        found = {arm[1:]: records for arm, records in ordered.items() if arm[0] == dataset}
        if len({depth for depth, _ in found}) > 1:  # a line needs two points
            pictures[f"rivals_{dataset}"] = draw(against_depth(found), width=7.5)
    table = arms_table(["data", "layers", "arm", *CELLS], ordered)
    write_report(options, __doc__, table, pictures=pictures)
