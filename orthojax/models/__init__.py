"""Flax linen models: `PlainNet` and its residual twin `ResNet`."""

from orthojax.models.nets import ConvNet, PlainNet, ResNet
from orthojax.models.stacking import stack_blocks, unstack_blocks

__all__ = ["ConvNet", "PlainNet", "ResNet", "stack_blocks", "unstack_blocks"]
