"""Flax linen models: plain nets and their residual twins."""

from orthojax.models.imagenet import ImageNetPlainNet, ImageNetResNet
from orthojax.models.nets import ConvNet, PlainNet, ResNet
from orthojax.models.normalization import BatchNorm
from orthojax.models.orthogonal import OrthogonalConv
from orthojax.models.stacking import in_order, stack_blocks, unstack_blocks
from orthojax.models.summary import describe_net

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
