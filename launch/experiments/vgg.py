"""A VGG-like net as people write them in Flax: no shortcuts, no normalization, default kernels."""

from flax import linen as nn


class Vgg(nn.Module):
    """Blocks of 3×3 convolutions and ReLU with 2×2 max-pooling between them.

    Attributes:
      depth: layers, the last of them dense.
      width: channels.
      kernel_scale: variance of the kernels times their fan-in: 1 is Flax's default, 2 is He's.
      num_classes: number of logits.
    """

    depth: int = 30
    width: int = 8
    kernel_scale: float = 1.0
    num_classes: int = 10

    @nn.compact
    def __call__(self, images, train):
        x = images
        kernel_init = nn.initializers.variance_scaling(
            self.kernel_scale, "fan_in", "truncated_normal"
        )
        for layer in range(self.depth - 1):
            if layer in (self.depth // 3, 2 * self.depth // 3):
                x = nn.max_pool(x, (2, 2), (2, 2))
            x = nn.relu(nn.Conv(self.width, (3, 3), kernel_init=kernel_init)(x))
        return nn.Dense(self.num_classes)(x.mean((1, 2)))
