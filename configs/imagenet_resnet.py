"""Residual twins of the plain nets on ImageNet, in the same protocol and preset."""

from ml_collections import ConfigDict

from orthojax.config import parse_arguments
from orthojax.configs import imagenet_plain


def get_config(arguments: str | None = None) -> ConfigDict:
    """Arguments: depth (34), epochs (120), preset (`full` or `mini`), and method: `l2` or `ortho`.

    `ortho` is orthonormal initialization and regularizer; a residual net has no modulation.
    """
    args = parse_arguments(
        arguments, depth=34, method=("l2", "ortho"), epochs=120, preset=("full", "mini")
    )
    config = imagenet_plain.get_config(
        f"depth={args.depth},method={args.method},epochs={args.epochs},preset={args.preset}"
    )
    config.model.name = "ImageNetResNet"
    config.modulation = None
    return config
