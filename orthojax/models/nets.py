"""Plain and residual nets of depth 6n + 2, for images of CIFAR-10's kind."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from orthojax.initializers import delta_orthonormal, orthonormal
from orthojax.linen import MOMENTS
from orthojax.models.blocks import ConvBN, LayerSpec, PlainBlock, ResidualBlock
from orthojax.modulation import Policy, first_link

# Name of an initialiser -> (shape-preserving kernels, kernels that change channels or stride).
# A delta kernel that drops pixels (stride) or copies channels is no isometry: Gram-Schmidt there.
KERNEL_INITS = {
    "orthonormal": (orthonormal, orthonormal),
    "delta_orthonormal": (delta_orthonormal, orthonormal),
    "he": (nn.initializers.he_normal, nn.initializers.he_normal),
}


class ConvNet(nn.Module):
    """A stem, three stages of n two-layer blocks, global average pooling and a dense head.

    The nets of He et al. (2016, section 4.2) and Xie et al. (2017, section 5.1): one 3×3
    convolution, then 6n of them at `width`, 2·`width` and 4·`width` channels, halving the
    resolution at the second and third stage; every convolution is followed by BN and ReLU.

    Attributes:
      depth: number of parametric layers, 6n + 2: 20, 44, 110, 1,004...
      width: channels of the first stage.
      num_classes: outputs of the head.
      kernel_init: "orthonormal" (Gram-Schmidt; the paper's), "delta_orthonormal" or "he", or an
        initializer `(key, shape, dtype) -> array` for all kernels.
      bn_bias: initial bias of every BN. The paper's is 0; a positive one lets most units pass
        the ReLU unchanged, so that a deep plain net is closer to an isometry at initialisation.
      bn_groups: batch normalization takes its statistics from this many parts of a batch, each on
        its own; 1 is the whole batch, on however many devices it lies. The number of devices makes
        it a matter of each device. See `orthojax.models.normalization.GroupedBatchNorm`.
      modulation: an `orthojax.Policy`, or None for no modulation.
      dtype: compute dtype (parameters, statistics and moments are float32).
      scan: stack each stage's equal blocks and run them by `nn.scan`, which compiles in seconds
        at any depth; False unrolls them. `orthojax.models.stack_blocks` and `unstack_blocks`
        convert the variables.

    Called with images, float (N, H, W, C), and `train`; returns float32 logits (N, classes).

    Raises:
      ValueError: depth is not 6n + 2, or the initialiser is unknown.
    """

    depth: int = 44
    width: int = 16
    num_classes: int = 10
    kernel_init: str | Callable[..., Any] = "orthonormal"
    bn_bias: float = 0.0
    bn_groups: int = 1
    modulation: Policy | None = None
    dtype: Any = jnp.float32
    scan: bool = True

    block: ClassVar[type[nn.Module]]

    def __post_init__(self):
        if self.depth < 8 or (self.depth - 2) % 6:
            below = max(8, 6 * ((self.depth - 2) // 6) + 2)
            raise ValueError(
                f"depth={self.depth} is not 6n + 2 (a stem, three stages of 2n layers, a head); "
                f"the nearest are {below} and {below + 6}"
            )
        if self.bn_groups < 1:
            raise ValueError(f"bn_groups={self.bn_groups} is not a positive number of groups")
        if not callable(self.kernel_init) and self.kernel_init not in KERNEL_INITS:
            raise ValueError(
                f"kernel_init={self.kernel_init!r} is unknown; take one of "
                f"{', '.join(KERNEL_INITS)}, or an initializer (key, shape, dtype) -> array"
            )
        super().__post_init__()

    def _spec(self) -> LayerSpec:
        if callable(self.kernel_init):
            kernel_init = change_init = self.kernel_init
        else:
            kernel_init, change_init = (make() for make in KERNEL_INITS[self.kernel_init])
        return LayerSpec(
            kernel_init, change_init, self.bn_bias, self.modulation, self.dtype, self.bn_groups
        )

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        spec = self._spec()
        x, link = ConvBN(self.width, spec, name="stem")(
            (images.astype(self.dtype), first_link()), train
        )
        carry = jax.nn.relu(x), link
        for index in range(3):
            stage = Stage(
                self.block,
                blocks=(self.depth - 2) // 6,
                features=self.width * 2**index,
                stride=1 if index == 0 else 2,
                spec=spec,
                scan=self.scan,
                name=f"stage_{index + 1}",
            )
            carry = stage(carry, train)
        x = jnp.mean(carry[0].astype(jnp.float32), axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=spec.change_init, name="head")(x)


class PlainNet(ConvNet):
    """The net without shortcuts: Conv-BN-ReLU all the way. See `ConvNet`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = PlainNet(depth=8, width=4, kernel_init="delta_orthonormal", bn_bias=1.0)
      >>> variables = net.init(jax.random.key(0), jnp.ones((2, 8, 8, 3)), train=False)
      >>> net.apply(variables, jnp.ones((2, 8, 8, 3)), train=False).shape
      (2, 10)
    """

    block = PlainBlock


class ResNet(ConvNet):
    """The residual twin of `PlainNet`, with 3×3 projection shortcuts. See `ConvNet`.

    Raises:
      ValueError: `modulation` is given; it is defined for a chain of layers.
    """

    block = ResidualBlock

    def __post_init__(self):
        if self.modulation is not None:
            raise ValueError(
                "ResNet takes no modulation: it is defined between two consecutive layers of a "
                "chain, and a shortcut gives a layer two neighbours above; leave it None"
            )
        super().__post_init__()


class Stage(nn.Module):
    """n blocks at one width; the first changes the shape if there is something to change.

    A block that changes the shape is named `entry`. The others are equal in shape: `block_0`,
    `block_1`, ... when unrolled, one `scanned` with a leading axis when scanned.
    """

    block: type[nn.Module]
    blocks: int
    features: int
    stride: int
    spec: LayerSpec
    scan: bool

    @nn.compact
    def __call__(self, carry, train: bool):
        equal = self.blocks
        if self.stride != 1 or carry[0].shape[-1] != self.features:
            carry = self.block(self.features, self.spec, self.stride, name="entry")(carry, train)
            equal -= 1
        if not self.scan:
            for index in range(equal):
                carry = self.block(self.features, self.spec, name=f"block_{index}")(carry, train)
        elif equal:
            scanned = nn.scan(
                lambda block, carry, _: (block(carry, train), None),
                variable_axes={"params": 0, "batch_stats": 0, MOMENTS: 0},
                split_rngs={"params": True},
                length=equal,
            )
            block = self.block(self.features, self.spec, name="scanned")
            carry, _ = scanned(block, carry, None)
        return carry
