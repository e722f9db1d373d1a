"""What several experiments train: nets on four data sets, and changes of their configs.

Changes are a dictionary of `section.key` -> value, see `changed`.
"""

import dataclasses

from orthojax.configs import (
    cifar10_plain,
    cifar10_resnet,
    digits_modulated,
    digits_plain110,
    imagenet_resnet,
)

PAPER_START = {"model.kernel_init": "orthonormal", "model.bn_bias": 0.0}
HE_START = {"model.kernel_init": "he", "model.bn_bias": 0.0}
RESIDUAL = {"model.name": "ResNet", **HE_START}
RESIDUAL_LAST_0 = {**RESIDUAL, "model.zero_init_residual": True}

UNMODULATED = {"modulation": None}
MODULATED = {"modulation": {"decay": 0.9, "tolerance": 10.0}}
NO_REGULARIZER = {"regularizer": {"name": "none"}}
L2 = {"regularizer": {"name": "l2", "coefficient": 1e-4}}
ORTHO = {"regularizer": {"name": "ortho", "coefficient": 1e-4}}
# Its rate is the relative change of a layer per step.
LARS = {
    "optimizer": {"name": "lars", "learning_rate": 0.005, "momentum": 0.9, "trust_coefficient": 1.0}
}
# A clipped gradient, and BN statistics of one pass over 1,280 training images.
CLIPPED = {"clip_grad_norm": 1.0, "recalibrate_bn": 1_280}
COSINE = {"schedule": {"name": "cosine", "warmup_steps": 100}}

LONG_STEPS = {"cpu": 8_000, "full": 64_000}  # of runs that end where accuracy settles
LONG_SEARCH_STEPS = {"cpu": 600, "full": 4_000}  # of the search for their rates

MEAN_RATE = {"step_decay": 0.5275, "linear": 0.5, "cosine": 0.5}  # of a run, over its rate
PAPER_STRENGTH = 1e-4 * 0.1 * 64_000 * MEAN_RATE["step_decay"]  # λ Σ η of the paper
TIME_CONSTANTS = 3.0  # of the penalty in `kept`, that a run lasts


def changed(config, *changes):
    """A copy of a config with every `section.key` or `section` of the changes set.

    A model whose `norm` is `none` has no `bn_bias`, and its run no BN statistics to compute.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        for key, value in (item for each in changes for item in each.items()):
            section, _, name = key.rpartition(".")
            (config[section] if section else config)[name] = value
        if config.model.get("norm") == "none":
            config.recalibrate_bn = 0
            if "bn_bias" in config.model:
                del config.model.bn_bias
    return config


def saved_every(steps):
    """Changes: evaluates, and saves a checkpoint, every so many steps."""
    return {"eval_every": steps, "checkpoint_every": steps}


def digits(depth, method, *changes, steps=300):
    """A net of width 8 on the digits, by a method of the configs, or `residual`: the baseline's."""
    residual = method == "residual"
    named = "baseline" if residual else method
    config = digits_plain110.get_config(f"depth={depth},method={named},steps={steps}")
    net = {"model.name": "ResNet"} if residual else {}
    return changed(config, net, saved_every(steps), {"mesh.data": 1}, *changes)


def digits_from_papers_start(depth, steps, *changes):
    """A net of width 8 on the digits: Gram-Schmidt kernels, modulated, clipped, rate down to 0."""
    config = digits_modulated.get_config(f"depth={depth},steps={steps}")
    return changed(config, saved_every(steps // 2), {"mesh.data": 1}, *changes)


def cifar10(options, depth, method, *changes):
    """A net on CIFAR-10: width 16 and the paper's protocol, or width 8 and 600 steps at 16×16."""
    if method == "residual":
        config = cifar10_resnet.get_config(f"depth={depth},method=baseline,preset={options.preset}")
    else:
        config = cifar10_plain.get_config(f"depth={depth},method={method},preset={options.preset}")
    small = {"model.width": 8, "mesh.data": 1, **saved_every(300)}
    place = {"dataset.data_dir": options.data_dir}
    return changed(config, place, small if options.preset == "cpu" else {}, *changes)


def near_isometric(options, dataset, depth, steps, *changes):
    """The near-isometric net of width 8 on the `digits`, or on `cifar10` at 16×16."""
    if dataset == "digits":
        return digits(depth, "near_isometric", *changes, steps=steps)
    length = {"steps": steps, **saved_every(steps)}
    small = dataclasses.replace(options, preset="cpu")
    return cifar10(small, depth, "near_isometric", length, *changes)


def lengthened(options):
    """Changes: a clipped run of `LONG_STEPS`, the rate down to 0 along a cosine."""
    length = {"steps": LONG_STEPS[options.preset], "log_every": 50, "checkpoint_every": 250}
    return {**length, **COSINE, **CLIPPED}


def imagenet(options, depth, method):
    """A residual net on ImageNet: the paper's protocol, or width 16 and 150 steps of 20 images."""
    preset = "mini" if options.preset == "cpu" else options.preset
    config = imagenet_resnet.get_config(f"depth={depth},method={method},preset={preset}")
    short = {"model.width": 16, "steps": 150, "eval_every": 150, "checkpoint_every": 50}
    small = {**short, "mesh.data": 1} if options.preset == "cpu" else {}
    return changed(config, {"dataset.data_dir": options.data_dir}, small)


def coefficient(config, strength=PAPER_STRENGTH):
    """The λ with which λ Σ η is `strength`, by default the paper's.

    A kernel's distance from what the regularizer wants decays with λ Σ η; a warm-up is not counted.
    """
    mean = MEAN_RATE[config.schedule.name]
    return strength / (config.optimizer.learning_rate * mean * config.steps)


def kept(config, by):
    """The config with its kernels kept orthonormal: by `penalty`, by `constraint`, or else not.

    An error of orthonormality decays with `4 λ Σ η / (1 - momentum)`: under the penalty by
    `exp(-TIME_CONSTANTS)` in the run.
    """
    if by == "constraint":
        return changed(config, NO_REGULARIZER, {"constraint": {"method": "polar"}})
    if by == "penalty":
        strength = TIME_CONSTANTS * (1 - config.optimizer.momentum) / 4
        penalty = {"name": "ortho", "coefficient": coefficient(config, strength)}
        return changed(config, {"regularizer": penalty})
    return changed(config, NO_REGULARIZER)
