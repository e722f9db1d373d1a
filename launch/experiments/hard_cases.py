"""Where modulation may be worth having: kernels of the wrong size, and numbers of 16 bits."""

from orthojax.experiments.arms import LADDER, MODULATED, clip, digits, folder
from orthojax.experiments.report import CELLS, cells, table, write_report
from orthojax.experiments.rivals import PAPER
from orthojax.experiments.sweep import over_seeds, tuned

TITLE = "Hard cases: with modulation, without it, and by other means"
STEPS = 600
KERNELS = {1.0: "Flax's default, 1 / fan-in", 2.0: "He's, 2 / fan-in"}
# Name -> (optimizer, its rate to begin the search with, modulation).
MEANS = {
    "SGD": ({"name": "sgd", "momentum": 0.9}, 0.05, None),
    "SGD, modulated": ({"name": "sgd", "momentum": 0.9}, 0.05, MODULATED),
    "LARS": ({"name": "lars", "momentum": 0.9, "trust_coefficient": 1.0}, 0.005, None),
    "Adam": ({"name": "adam"}, 0.001, None),
}
# (Start, layers) -> (the model's changes, steps). From the paper's, 302 layers do not learn.
NETS = {
    ("near-isometric", 110): ({}, 300),
    ("the paper's", 110): (PAPER, 600),
    ("near-isometric", 302): ({}, 300),
}
# Name -> (dtype, loss scale, modulation); what decides first.
PRECISIONS = {
    "float16, dynamic loss scale": ("float16", {"growth_interval": 50}, None),
    "float16, modulated": ("float16", None, MODULATED),
    "float32": ("float32", None, None),
    "float32, modulated": ("float32", None, MODULATED),
    "float16": ("float16", {"scale": 1.0, "growth_interval": 10_000}, None),
    "bfloat16": ("bfloat16", None, None),
}


def _vgg(kernel_scale, means):
    optimizer, rate, modulation = MEANS[means]
    config = digits(44, "near_isometric", STEPS)
    with config.unlocked(), config.ignore_type():
        config.model = {"name": "experiments.vgg:Vgg", "kernel_scale": kernel_scale}
        config.modulation, config.regularizer = modulation, {"name": "none"}
        config.optimizer = {**optimizer, "learning_rate": rate}
        config.clip_grad_norm = 1.0
    return config


def _plain(net, precision):
    (_, depth), (model, steps) = net, NETS[net]
    dtype, loss_scale, modulation = PRECISIONS[precision]
    config = digits(depth, "near_isometric", steps)
    with config.unlocked(), config.ignore_type():
        config.model.update(model)
        config.dtype, config.loss_scale, config.modulation = dtype, loss_scale, modulation
        config.optimizer.learning_rate = 0.05
        clip(config)
    return config


def jobs(options):
    """(table, row, column) -> job."""
    found = {}
    for scale in KERNELS:
        for means, (_, rate, _) in MEANS.items():
            found["kernels", scale, means] = tuned(
                _vgg(scale, means),
                options.workdir / folder("vgg", f"{scale:g}", means),
                options.seeds,
                rates=LADDER,
                start=rate,
            )
    for net in NETS:
        for precision in PRECISIONS:
            found["precision", net, precision] = over_seeds(
                _plain(net, precision), options.workdir / folder(*net, precision), options.seeds
            )
    return found


def report(options, results):
    """Two tables: kernels of the wrong size, and precision."""
    of_kernels, of_precision = [], []
    for (which, case, arm), records in results.items():
        if which == "kernels":
            of_kernels.append([KERNELS[case], arm, *cells(records)])
        else:
            of_precision.append([*case, arm, *cells(records)])
    write_report(
        options,
        TITLE,
        "A VGG-like net as people write them in Flax (`launch/experiments/vgg.py`), unedited: 30 "
        "layers, 3×3 convolutions of width 8 and ReLU, no shortcuts and no normalization. For "
        "ReLU a variance of 2 / fan-in is right.",
        table(["kernels' variance", "means", *CELLS], of_kernels),
        "Plain layers of width 8 with batch normalization, activations and errors in 16 bits, "
        "parameters in 32; all at one learning rate.",
        table(["start", "layers", "precision", *CELLS], of_precision),
        f"Digits, {STEPS} steps of 128 ({NETS['near-isometric', 110][1]} from the near-isometric "
        "start), the gradient clipped to a norm of 1. In the first table each arm has the rate "
        "with the least training loss of the first seed, from a ladder; in the second BN "
        "statistics are those of one pass over 1,280 training images, and the dynamic loss scale "
        "starts at 65,536, halves with every gradient that is not finite and doubles after 50 that "
        "are.",
    )
