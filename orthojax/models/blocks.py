"""The blocks of plain and residual nets, and the Conv-BN layers that they consist of."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from orthojax.models.convolution import conv_general_dilated
from orthojax.models.normalization import BatchNorm

#: Of the running statistics of batch normalization.
BN_MOMENTUM = 0.9
BN_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What all Conv-BN layers of a net have in common.

    Attributes:
      kernel_init: initializer of kernels that keep channels and resolution.
      change_init: initializer of kernels that change the channel count or the resolution.
      bn_bias: initial bias of batch normalization (the mean before the ReLU).
      modulated: whether there is a modulation site behind every convolution.
      dtype: compute dtype; parameters, statistics and moments are float32.
      bn_groups: groups of the batch that batch normalization treats apart.
    """

    kernel_init: Any
    change_init: Any
    bn_bias: float = 0.0
    modulated: bool = False
    dtype: Any = jnp.float32
    bn_groups: int = 1


class ConvBN(nn.Module):
    """Convolution, modulation site, batch normalization, ReLU: the unit that a layer is counted by.

    Called as `x, train`; x is (N, H, W, C) and comes back as
    (N, ceil(H / stride), ceil(W / stride), features).
    """

    features: int
    spec: LayerSpec
    stride: int = 1
    window: int = 3
    relu: bool = True

    @nn.compact
    def __call__(self, x, train: bool):
        spec = self.spec
        same = x.shape[-1] == self.features and self.stride == 1
        x = nn.Conv(
            self.features,
            (self.window, self.window),
            self.stride,
            use_bias=False,
            dtype=spec.dtype,
            kernel_init=spec.kernel_init if same else spec.change_init,
            # In evaluation JAX's own, which forward-mode differentiation goes through.
            conv_general_dilated=conv_general_dilated if train else None,
            name="conv",
        )(x)
        return BatchNorm(
            use_running_average=not train,
            relu=self.relu,
            modulated=spec.modulated,
            groups=spec.bn_groups,
            momentum=BN_MOMENTUM,
            epsilon=BN_EPSILON,
            dtype=spec.dtype,
            bias_init=nn.initializers.constant(spec.bn_bias),
            name="bn",
        )(x)


@dataclasses.dataclass(frozen=True)
class BlockLayout:
    """The convolutions of a block.

    Attributes:
      layers: window and channels of each, the channels in multiples of the block's `features`.
      shortcut: window of the projection shortcut that a residual block has where it changes the
        shape.
    """

    layers: tuple[tuple[int, int], ...]
    shortcut: int = 3

    @property
    def expansion(self) -> int:
        """Channels that leave the block, in multiples of its `features`."""
        return self.layers[-1][1]


BASIC = BlockLayout(layers=((3, 1), (3, 1)))


class _Block(nn.Module):
    """What plain and residual blocks share.

    Called as `x, train`; x is (N, H, W, C) and comes back as
    (N, ceil(H / stride), ceil(W / stride), features · expansion). The stride is that of the first
    convolution, also where its window is 1×1 (He et al. 2016).
    """

    features: int
    spec: LayerSpec
    stride: int = 1
    layout: BlockLayout = BASIC

    def _layers(self, relu_at_last: bool = True) -> list[ConvBN]:
        last = len(self.layout.layers) - 1
        return [
            ConvBN(
                self.features * expansion,
                self.spec,
                self.stride if index == 0 else 1,
                window,
                relu=index < last or relu_at_last,
                name=f"layer_{index}",
            )
            for index, (window, expansion) in enumerate(self.layout.layers)
        ]


class PlainBlock(_Block):
    """Conv-BN-ReLU, for every layer of the layout."""

    @nn.compact
    def __call__(self, x, train: bool):
        for layer in self._layers():
            x = layer(x, train)
        return x


class ResidualBlock(_Block):
    """Conv-BN, ReLU between them, added to a shortcut, then ReLU.

    The shortcut is the identity, or a projection with BN where the shape changes: 3×3, if the
    layout does not say otherwise (Xie et al., section 5.1).
    """

    @nn.compact
    def __call__(self, x, train: bool):
        y = x
        for layer in self._layers(relu_at_last=False):
            y = layer(y, train)
        if y.shape != x.shape:
            window, features = self.layout.shortcut, y.shape[-1]
            shortcut = ConvBN(features, self.spec, self.stride, window, relu=False, name="shortcut")
            x = shortcut(x, train)
        return jax.nn.relu(x + y)
