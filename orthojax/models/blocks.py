"""The blocks of plain and residual nets: two convolutions each."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from orthojax.linen import Modulation
from orthojax.models.convolution import conv_general_dilated
from orthojax.models.normalization import GroupedBatchNorm
from orthojax.modulation import Policy


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """What all Conv-BN layers of a net have in common.

    Attributes:
      kernel_init: initializer of kernels that keep channels and resolution.
      change_init: initializer of kernels that change the channel count or the resolution.
      bn_bias: initial bias of batch normalization (the mean before the ReLU).
      policy: modulation policy, or None for no modulation.
      dtype: compute dtype; parameters, statistics and moments are float32.
      bn_groups: groups of the batch that batch normalization treats apart.
    """

    kernel_init: Any
    change_init: Any
    bn_bias: float = 0.0
    policy: Policy | None = None
    dtype: Any = jnp.float32
    bn_groups: int = 1


class ConvBN(nn.Module):
    """Convolution, modulation site, batch normalization: the unit that a layer is counted by.

    Called as `(x, link), train`; x is (N, H, W, C) and comes back as
    (N, ceil(H / stride), ceil(W / stride), features).
    """

    features: int
    spec: LayerSpec
    stride: int = 1
    window: int = 3

    @nn.compact
    def __call__(self, carry, train: bool):
        x, link = carry
        spec = self.spec
        same = x.shape[-1] == self.features and self.stride == 1
        x = nn.Conv(
            self.features,
            (self.window, self.window),
            self.stride,
            use_bias=False,
            dtype=spec.dtype,
            kernel_init=spec.kernel_init if same else spec.change_init,
            conv_general_dilated=conv_general_dilated,
            name="conv",
        )(x)
        if spec.policy is not None:
            x, link = Modulation(spec.policy, name="modulation")(x, link)
        grouped = spec.bn_groups > 1
        norm = functools.partial(GroupedBatchNorm, spec.bn_groups) if grouped else nn.BatchNorm
        x = norm(
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=spec.dtype,
            bias_init=nn.initializers.constant(spec.bn_bias),
            name="bn",
        )(x)
        return x, link


class PlainBlock(nn.Module):
    """Conv-BN-ReLU, twice."""

    features: int
    spec: LayerSpec
    stride: int = 1

    @nn.compact
    def __call__(self, carry, train: bool):
        for index, stride in enumerate((self.stride, 1)):
            x, link = ConvBN(self.features, self.spec, stride, name=f"layer_{index}")(carry, train)
            carry = jax.nn.relu(x), link
        return carry


class ResidualBlock(nn.Module):
    """Conv-BN-ReLU-Conv-BN added to a shortcut, then ReLU.

    The shortcut is the identity, or a 3×3 projection with BN where the shape changes (Xie et
    al., section 5.1). There is no modulation here: two paths reach every layer, so "the layer
    above" is not one layer.
    """

    features: int
    spec: LayerSpec
    stride: int = 1

    @nn.compact
    def __call__(self, carry, train: bool):
        x, link = carry
        y, _ = ConvBN(self.features, self.spec, self.stride, name="layer_0")(carry, train)
        y, _ = ConvBN(self.features, self.spec, name="layer_1")((jax.nn.relu(y), link), train)
        if y.shape != x.shape:
            x, _ = ConvBN(self.features, self.spec, self.stride, name="shortcut")(carry, train)
        return jax.nn.relu(x + y), link
