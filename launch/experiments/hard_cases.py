"""Hard cases, with modulation, without it, and by other means: wrong kernels, 16 bits.

The first table: a VGG-like net as people write them in Flax (`launch/experiments/vgg.py`),
unedited: 30 layers, 3×3 convolutions of width 8 and ReLU, no shortcuts and no normalization. For
ReLU a variance of 2 / fan-in is right. Each arm has the rate with the smallest training loss of the
first seed, from a ladder.

The second table: plain layers of width 8 with batch normalization, activations and errors in 16
bits, parameters in 32; all at one learning rate, BN statistics of one pass over 1,280 training
images. The dynamic loss scale starts at 65,536, halves with every gradient that is not finite and
doubles after 50 that are.

Digits, 600 steps of 128 (300 from the near-isometric start), the gradient clipped to a norm of 1.
"""

import itertools

from orthojax.experiments import arms
from orthojax.experiments.report import CELLS, arms_table, write_report
from orthojax.experiments.sweep import over_seeds, tuned

KERNELS = {1.0: "Flax's default, 1 / fan-in", 2.0: "He's, 2 / fan-in"}
SGD = {"optimizer": {"name": "sgd", "learning_rate": 0.05, "momentum": 0.9}}
# Name -> changes of an unmodulated net; the search for a rate begins at the optimizer's.
MEANS = {
    "SGD": SGD,
    "SGD, modulated": {**SGD, **arms.MODULATED},
    "LARS": arms.LARS,
    "Adam": {"optimizer": {"name": "adam", "learning_rate": 0.001}},
}
# (Start, layers) -> (changes, steps). From the paper's, 302 layers do not learn.
NETS = {
    ("near-isometric", 110): ({}, 300),
    ("the paper's", 110): (arms.PAPER_START, 600),
    ("near-isometric", 302): ({}, 300),
}
DYNAMIC = {"loss_scale": {"growth_interval": 50}}
CONSTANT = {"loss_scale": {"scale": 1.0, "growth_interval": 10_000}}
# Name -> changes of an unmodulated net; what decides first.
PRECISIONS = {
    "float16, dynamic loss scale": {"dtype": "float16", **DYNAMIC},
    "float16, modulated": {"dtype": "float16", **arms.MODULATED},
    "float32": {"dtype": "float32"},
    "float32, modulated": {"dtype": "float32", **arms.MODULATED},
    "float16": {"dtype": "float16", **CONSTANT},
    "bfloat16": {"dtype": "bfloat16"},
}


def _vgg(kernel_scale, means):
    vgg = {"model": {"name": "experiments.vgg:Vgg", "kernel_scale": kernel_scale}}
    common = {**vgg, **arms.NO_REGULARIZER, **arms.UNMODULATED, "clip_grad_norm": 1.0}
    return arms.digits(44, "near_isometric", common, MEANS[means], steps=600)


def _plain(net, precision):
    start, steps = NETS[net]
    common = {**SGD, **arms.CLIPPED, **arms.UNMODULATED, "loss_scale": None}
    return arms.digits(net[1], "near_isometric", common, start, PRECISIONS[precision], steps=steps)


def jobs(options):
    """(table, row, column) -> job."""
    found = {}
    for scale, means in itertools.product(KERNELS, MEANS):
        made, place = _vgg(scale, means), options.arm("vgg", f"{scale:g}", means)
        found["kernels", scale, means] = tuned(made, *place)
    for net, precision in itertools.product(NETS, PRECISIONS):
        made, place = _plain(net, precision), options.arm(*net, precision)
        found["precision", net, precision] = over_seeds(made, *place)
    return found


def report(options, results):
    """Two tables: kernels of the wrong size, and precision."""
    kernels = {(KERNELS[k], arm): r for (which, k, arm), r in results.items() if which == "kernels"}
    precision = {(*n, arm): r for (which, n, arm), r in results.items() if which == "precision"}
    write_report(
        options,
        __doc__,
        arms_table(["kernels' variance", "means", *CELLS], kernels),
        arms_table(["start", "layers", "precision", *CELLS], precision),
    )
