"""The blocks of plain and residual nets, and the Conv-BN layers that they consist of."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from orthojax.linen import site_of
from orthojax.models.activations import Activation
from orthojax.models.convolution import conv_general_dilated
from orthojax.models.dirac import dirac
from orthojax.models.normalization import BatchNorm
from orthojax.models.repvgg import IDENTITY_BN, POINT, POINT_BN, centers
from orthojax.sites import modulate

#: Of the running statistics of batch normalization.
BN_MOMENTUM = 0.9
BN_EPSILON = 1e-5


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What all Conv-BN layers of a net have in common.

    Attributes:
      kernel_init: initializer of kernels that keep channels and resolution.
      change_init: initializer of kernels that change the channel count or the resolution.
      activation: what follows; ReLU is fused into batch normalization.
      bn_bias: initial bias of batch normalization (the mean before the activation).
      bn_scale: its initial scale.
      zero_last: whether the last of a residual block begins at 0 instead.
      modulated: whether there is a modulation site behind every convolution.
      dtype: compute dtype; parameters, statistics and moments are float32.
      bn_groups: groups of the batch that batch normalization treats apart.
      norm: "batch", or "none": then a convolution has a bias.
      bias_std: standard deviation of that bias at initialization.
      carry: share of the channels that `bn_bias` is the bias of, the others having 0; 0 is all.
      parametrization: "direct"; "dirac", where a kernel keeps channels and resolution; "repvgg".
    """

    kernel_init: Any
    change_init: Any
    activation: Activation = Activation(lambda: jax.nn.relu)
    bn_bias: float = 0.0
    bn_scale: float = 1.0
    zero_last: bool = False
    modulated: bool = False
    dtype: Any = jnp.float32
    bn_groups: int = 1
    norm: str = "batch"
    bias_std: float = 0.0
    parametrization: str = "direct"
    carry: float = 0.0

    def bias_init(self, key, shape, dtype=jnp.float32):
        """`(features,)` biases of batch normalization: `bn_bias` of channels that carry, else 0."""
        del key
        carried = shape[-1] if not self.carry else round(self.carry * shape[-1])
        return jnp.where(jnp.arange(shape[-1]) < carried, self.bn_bias, 0).astype(dtype)


class ConvBN(nn.Module):
    """Convolution, modulation site, batch normalization, ReLU: the unit that a layer is counted by.

    The last two are what `spec` says: the normalization may be missing, and the activation another.

    Called as `x, train`; x is (N, H, W, C) and comes back as
    (N, ceil(H / stride), ceil(W / stride), features), with `spec.activation.copies` times the
    features where the activation is applied.
    """

    features: int
    spec: LayerSpec
    stride: int = 1
    window: int = 3
    activate: bool = True

    @nn.compact
    def __call__(self, x, train: bool):
        spec = self.spec
        copies = spec.activation.copies
        same = x.shape[-1] == copies * self.features and self.stride == 1
        normalized, branched = spec.norm == "batch", spec.parametrization == "repvgg"
        convolve = conv_general_dilated if train else None
        activation = spec.activation.make() if self.activate else None
        fused = normalized and not branched and activation is jax.nn.relu

        def conv(name, window, stride):
            return nn.Conv(
                self.features,
                (window, window),
                stride,
                use_bias=not normalized,
                dtype=spec.dtype,
                kernel_init=spec.kernel_init if same else spec.change_init,
                bias_init=nn.initializers.normal(spec.bias_std),
                # In evaluation JAX's own, which forward-mode differentiation goes through.
                conv_general_dilated=dirac(self, self.features, convolve)
                if same and spec.parametrization == "dirac"
                else convolve,
                name=name,
            )

        def norm(name, bias_init=nn.initializers.zeros):
            branches = (3 if same else 2) if branched else 1
            return BatchNorm(
                use_running_average=not train,
                relu=fused,
                modulated=spec.modulated,
                groups=spec.bn_groups,
                momentum=BN_MOMENTUM,
                epsilon=BN_EPSILON,
                dtype=spec.dtype,
                bias_init=bias_init,
                scale_init=nn.initializers.constant(spec.bn_scale / math.sqrt(branches)),
                name=name,
            )

        y = conv("conv", self.window, self.stride)(x)
        if normalized:
            y = norm("bn", spec.bias_init)(y)
        elif spec.modulated and (site := site_of(self)) is not None:
            y = modulate(y, site)
        if branched:
            read = centers(x, self.stride, self.window)
            y += norm(POINT_BN)(conv(POINT, 1, 1)(read))
            if same:
                y += norm(IDENTITY_BN)(x)
        return y if activation is None or fused else activation(y)


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
    (N, ceil(H / stride), ceil(W / stride), features · expansion), times the activation's copies of
    the channels. The stride is that of the first
    convolution, also where its window is 1×1 (He et al. 2016).
    """

    features: int
    spec: LayerSpec
    stride: int = 1
    layout: BlockLayout = BASIC

    def _layers(self, branch: bool = False) -> list[ConvBN]:
        last, ending = len(self.layout.layers) - 1, self.spec
        if branch and self.spec.zero_last:
            ending = dataclasses.replace(self.spec, bn_scale=0.0)
        return [
            ConvBN(
                self.features * expansion,
                ending if index == last else self.spec,
                self.stride if index == 0 else 1,
                window,
                activate=index < last or not branch,
                name=f"layer_{index}",
            )
            for index, (window, expansion) in enumerate(self.layout.layers)
        ]


class PlainBlock(_Block):
    """Convolution, normalization, activation, for every layer of the layout."""

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
        for layer in self._layers(branch=True):
            y = layer(y, train)
        if y.shape != x.shape:
            window, features = self.layout.shortcut, y.shape[-1]
            shortcut = ConvBN(
                features, self.spec, self.stride, window, activate=False, name="shortcut"
            )
            x = shortcut(x, train)
        return self.spec.activation.make()(x + y)
