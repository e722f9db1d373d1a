"""Plain and residual nets for ImageNet: Table 1 of Xie et al. (2017)."""

from flax import linen as nn

from orthojax import checks
from orthojax.errors import ConfigError
from orthojax.models.blocks import BASIC, BlockLayout, ResidualBlock
from orthojax.models.nets import Architecture, ConvNet

BOTTLENECKS = {
    "paper": BlockLayout(layers=((1, 1), (1, 1), (3, 4))),
    "standard": BlockLayout(layers=((1, 1), (3, 1), (1, 4)), shortcut=1),
}

# Blocks of each stage, of He et al. (2016), table 1. At 34 layers they are no bottlenecks.
BLOCKS = {34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class ImageNetPlainNet(ConvNet):
    """The net of Table 1, without shortcuts; see `ConvNet` for what is not named here.

    `stem`, 7×7 with stride 2; `pool`, 3×3 max pooling with stride 2; `stage_1` to `stage_4` (the
    table's conv2_x to conv5_x) at c = 1, 2, 4 and 8 times `width`, halving the resolution from the
    second on; `last`, 3×3 to 16·`width` channels; average pooling; `head`. At 34 layers a block is
    two 3×3 convolutions to c channels, deeper it is a bottleneck to 4c. The first convolution of
    a stage has the stride, as in He et al. (2016): in a bottleneck it is a 1×1, which reads one
    pixel in four.

    The depth is He et al.'s count of stem, blocks and head. Table 1 adds `last` and keeps the
    names: there are `depth` + 1 parametric layers.

    "paper" bottlenecks are 1×1 to c, 1×1 to c, 3×3 to 4c: `f_in >= f_out` in every kernel (with
    1,000 classes in the head too, thanks to `last`). "standard" ones, He et al.'s, are 1×1 to c,
    3×3 to c, 1×1 to 4c, where the last kernel, c × 4c, can be orthonormal only in groups of c
    columns; that is what `orthojax.orthonormal` and `orthojax.optax_ortho` make of it by default.

    Attributes:
      depth: 34 or 101, which are the paper's; 50 or 152, He et al.'s, by the same rule.
      width: channels of the first stage; the table's is 64.
      num_classes: outputs of the head.
      bottleneck: "paper" or "standard".

    Raises:
      ConfigError: depth or bottleneck is unknown, or 34 layers shall have another bottleneck; see
        also `ConvNet`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net, images = ImageNetPlainNet(depth=101, width=4), jnp.ones((2, 64, 64, 3))
      >>> variables = jax.eval_shape(lambda: net.init(jax.random.key(0), images, train=False))
      >>> variables["params"]["stage_3"]["scanned"]["layer_2"]["conv"]["kernel"].shape
      (22, 3, 3, 16, 64)
    """

    depth: int = 34
    width: int = 64
    num_classes: int = 1000
    bottleneck: str = "paper"

    @nn.nowrap
    def _architecture(self) -> Architecture:
        if self.depth not in BLOCKS:
            raise checks.refuse("depth", self.depth, f"one of {', '.join(map(str, BLOCKS))}")
        checks.choice("bottleneck", self.bottleneck, BOTTLENECKS)
        layout = BOTTLENECKS[self.bottleneck]
        if self.depth == 34:
            if self.bottleneck != "paper":
                raise ConfigError(
                    f"depth=34 has no bottlenecks, so bottleneck={self.bottleneck!r} would change "
                    "nothing; leave it, or take depth 50"
                )
            layout = BASIC
        return Architecture(
            BLOCKS[self.depth], layout, stem_window=7, stem_stride=2, max_pool=True, last=16
        )


class ImageNetResNet(ImageNetPlainNet):
    """The residual twin of `ImageNetPlainNet`.

    Where a block changes the shape, its shortcut is a 3×3 projection. The paper says so for
    CIFAR-10 and is silent on ImageNet, but a 1×1 that doubles the channels would have
    `f_in < f_out`. With "standard" bottlenecks it is He et al.'s 1×1, which has.

    Raises:
      ConfigError: see `ImageNetPlainNet`.
    """

    block = ResidualBlock
