"""Residual twins of the plain nets on CIFAR-10, in the same protocol and preset."""

from ml_collections import ConfigDict

from orthojax.config import parse_arguments
from orthojax.configs import cifar10_plain
from orthojax.configs._methods import RESIDUAL_METHODS


def get_config(arguments: str | None = None) -> ConfigDict:
    """Arguments: depth (44), preset (`full` or `cpu`), method (`baseline` or `paper`).

    `paper` is orthonormal initialization and regularizer; a residual net has no modulation.
    """
    args = parse_arguments(arguments, depth=44, method=RESIDUAL_METHODS, preset=("full", "cpu"))
    config = cifar10_plain.get_config(
        f"depth={args.depth},method={args.method},preset={args.preset}"
    )
    config.model.name, config.modulation = "ResNet", None
    if args.preset == "cpu":
        # The smallest training loss of 0.1, 0.05 and 0.02 after 200 steps.
        config.optimizer.learning_rate = 0.02
    return config
