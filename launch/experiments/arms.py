"""The configs that the experiments compare, of three data sets and one schedule each."""

from orthojax.configs import cifar10_plain, cifar10_resnet, digits_plain110, imagenet_resnet

# Learning rates to choose from, two or three to a factor of ten.
LADDER = (1e-4, 2e-4, 5e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

LONG_STEPS = {"cpu": 8_000, "full": 64_000}  # of runs that end where accuracy settles
LONG_SEARCH_STEPS = {"cpu": 600, "full": 4_000}  # of the search for their rates

PAPER_RATES = 0.1 * (32_000 + 0.1 * 16_000 + 0.01 * 16_000)  # Σ η of the paper's 64,000 steps

MODULATED = {"decay": 0.9, "tolerance": 10.0}  # arguments of `orthojax.modulation`


def digits(depth, method, steps=300):
    """A net of width 8 on the digits, by a method of the configs, or `residual`: the baseline's."""
    residual = method == "residual"
    named = "baseline" if residual else method
    config = digits_plain110.get_config(f"depth={depth},method={named},steps={steps}")
    config.eval_every = config.checkpoint_every = steps
    if residual:
        config.model.name = "ResNet"
    config.mesh.data = 1
    return config


def cifar10(depth, method, preset, data_dir=None):
    """A net on CIFAR-10: width 16 and the paper's protocol, or width 8 and 600 steps at 16×16."""
    if method == "residual":
        config = cifar10_resnet.get_config(f"depth={depth},method=baseline,preset={preset}")
    else:
        config = cifar10_plain.get_config(f"depth={depth},method={method},preset={preset}")
    config.dataset.data_dir = data_dir
    if preset == "cpu":
        config.model.width = 8
        config.eval_every = config.checkpoint_every = 300
        config.mesh.data = 1
    return config


def clip(config):
    """Clips the gradient, and has BN statistics of one pass over 1,280 training images."""
    config.clip_grad_norm, config.recalibrate_bn = 1.0, 1_280


def paper_coefficient(rate, steps):
    """The coefficient with which λ Σ η is the paper's; the rate falls to 0 in a line or a cosine.

    A kernel's distance from what the regularizer wants decays with λ Σ η.
    """
    return 1e-4 * PAPER_RATES / (rate * steps / 2)


def folder(*names):
    """The name of an arm's directory.

    Example:
      >>> folder("the paper's start, modulated", 110)
      'the_papers_start_modulated_110'
    """
    kept = "_".join(map(str, names)).replace(" ", "_")
    return kept.replace(",", "").replace("'", "")


def lengthen(config, preset):
    """A clipped run of `LONG_STEPS`, the rate down to 0 along a cosine."""
    config.steps = LONG_STEPS[preset]
    config.schedule = {"name": "cosine", "warmup_steps": 100}
    clip(config)
    config.log_every, config.checkpoint_every = 50, 250


def imagenet(depth, method, preset, data_dir=None):
    """A residual net on ImageNet: the paper's protocol, or width 16 and 150 steps of 20 images."""
    mini = "mini" if preset == "cpu" else preset
    config = imagenet_resnet.get_config(f"depth={depth},method={method},preset={mini}")
    config.dataset.data_dir = data_dir
    if preset == "cpu":
        config.model.width = 16
        config.steps = config.eval_every = 150
        config.checkpoint_every = 50
        config.mesh.data = 1
    return config
