"""Residual twins of the plain nets on ImageNet, in the same protocol and preset."""

from ml_collections import ConfigDict

from orthojax.config import parse_arguments
from orthojax.configs import imagenet_plain
from orthojax.configs._methods import RESIDUAL_METHODS


def get_config(arguments: str | None = None) -> ConfigDict:
    """Arguments: depth (34), epochs (120), preset (`full` or `mini`), method (`baseline`, `paper`).

    `paper` is orthonormal initialization and regularizer; a residual net has no modulation.
    """
    args = parse_arguments(
        arguments, depth=34, method=RESIDUAL_METHODS, epochs=120, preset=("full", "mini")
    )
    config = imagenet_plain.get_config(
        f"depth={args.depth},method={args.method},epochs={args.epochs},preset={args.preset}"
    )
    config.model.name, config.modulation = "ImageNetResNet", None
    return config
