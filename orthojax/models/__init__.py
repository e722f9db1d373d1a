"""Flax linen models: plain nets and their residual twins."""

from orthojax.extras import require

require("flax", "orthojax.models")

from orthojax.models.describe_net import describe_net
from orthojax.models.imagenet import ImageNetPlainNet, ImageNetResNet
from orthojax.models.nets import ConvNet, PlainNet, ResNet
from orthojax.models.normalization import BatchNorm
from orthojax.models.orthogonal import OrthogonalConv
from orthojax.models.stacking import in_order, stack_blocks, unstack_blocks

__all__ = [
    "BatchNorm",
    "ConvNet",
    "ImageNetPlainNet",
    "ImageNetResNet",
    "OrthogonalConv",
    "PlainNet",
    "ResNet",
    "describe_net",
    "in_order",
    "stack_blocks",
    "unstack_blocks",
]
