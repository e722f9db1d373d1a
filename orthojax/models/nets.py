"""What all nets share, and the nets of depth 6n + 2, for images of CIFAR-10's kind."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn

from orthojax import checks
from orthojax.errors import ConfigError
from orthojax.initializers import carrying, delta_orthonormal, mirrored, orthonormal
from orthojax.linen import counted_sites
from orthojax.models.activations import ACTIVATIONS
from orthojax.models.blocks import (
    BASIC,
    BlockLayout,
    ConvBN,
    LayerSpec,
    PlainBlock,
    ResidualBlock,
)
from orthojax.models.stacking import REMATS, Stage

# Name of an initializer -> (shape-preserving kernels, kernels that change channels or stride).
# A delta kernel that drops pixels (stride) or copies channels is no isometry: Gram-Schmidt there.
KERNEL_INITS = {
    "orthonormal": (orthonormal, orthonormal),
    "delta_orthonormal": (delta_orthonormal, orthonormal),
    "carrying": (carrying, orthonormal),
    "he": (nn.initializers.he_normal, nn.initializers.he_normal),
}
UNSCALED = ("he", "carrying")  # those without a gain
NORMS = ("batch", "none")
PARAMETRIZATIONS = ("direct", "dirac", "repvgg")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What tells one `ConvNet` from another.

    Attributes:
      blocks: number of blocks of each stage. A stage has twice the channels of the one before, and
        half its resolution.
      layout: the convolutions of a block.
      stem_window: window of the first convolution.
      stem_stride: its stride.
      max_pool: whether 3×3 max pooling with stride 2 follows it.
      last: channels of a 3×3 convolution between the stages and the average pooling, in multiples
        of the width; 0 for none.
    """

    blocks: tuple[int, ...]
    layout: BlockLayout = BASIC
    stem_window: int = 3
    stem_stride: int = 1
    max_pool: bool = False
    last: int = 0


class ConvNet(nn.Module):
    """A stem, stages of equal blocks, global average pooling and a dense head.

    The common part of `PlainNet`, `ResNet`, `ImageNetPlainNet` and `ImageNetResNet`. Every
    convolution is followed by BN and ReLU (by the addition first, where a shortcut ends), and has
    "SAME" padding.

    Attributes:
      depth: number of layers; a subclass says which there are.
      width: channels of the first stage.
      num_classes: outputs of the head.
      kernel_init: "orthonormal" (Gram-Schmidt; the paper's), "delta_orthonormal", "carrying" (see
        `carry`) or "he", or an initializer `(key, shape, dtype) -> array` for all kernels.
      kernel_gain: singular value of orthonormal kernels; with tanh and no normalization take
        `orthojax.mean_field.critical_tanh`'s.
      norm: "batch", or "none"; then every convolution has a bias.
      bias_std: standard deviation of these biases at initialization.
      activation: "relu"; "prelu", with a trained slope for each channel; "tanh"; "crelu", under
        kernels that are mirrored, so that the net is linear at initialization (Balduzzi et al.
        2017); "shifted_relu" (Qi et al. 2020);
        "tailored_relu" and "shaped_softplus", which are solved from the depth (Zhang et al. 2022,
        Martens et al. 2021).
      parametrization: "direct", or "dirac": kernels that keep the shape have the identity inside
        them (Zagoruyko and Komodakis 2017); "repvgg": linear branches beside every kernel, which
        `orthojax.inference` folds into it (Ding et al. 2021).
      carry: share of a layer's channels, the first, that begin as the identity of those below; the
        others compute on all, and the first do not read them. So the net begins as a residual one
        inside plain kernels, whose branches begin at 0 (`orthojax.initializers.carrying`).
        `bn_bias` is then that of carrying channels alone; with "prelu" they need none, since their
        slope begins at 1.
      bn_bias: initial bias of every BN. The paper's is 0; a positive one lets most units pass
        the ReLU unchanged, so that a deep plain net is closer to an isometry at initialization.
      bn_scale: initial scale of every BN.
      bn_groups: batch normalization takes its statistics from this many parts of a batch, each on
        its own; 1 is the whole batch, on however many devices it lies. The number of devices makes
        it a matter of each device. See `orthojax.models.normalization.BatchNorm`.
      modulated: whether there is a modulation site at the output of every convolution; then
        train with `orthojax.modulation`.
      dtype: compute dtype (parameters, statistics and moments are float32).
      scan: stack each stage's equal blocks and run them by `nn.scan`, which compiles in seconds
        at any depth; False unrolls them. `orthojax.models.stack_blocks` and `unstack_blocks`
        convert the variables.
      unroll: how many equal blocks a turn of the scan does; more compile longer, and leave a device
        fewer loops to wait for.
      remat: what the backward pass computes again, for less memory, in more time, with the same
        result: "none"; "blocks", all but what goes from block to block; or "segments", all but
        what goes from one to the next of about √n segments of √n blocks, a segment before its
        blocks, so that the memory of a stage grows with the root of its depth (needs `scan`).

    Called with images, float (N, H, W, C), and `train`; returns float32 logits (N, classes).

    Raises:
      ConfigError: the depth, the initializer or another name is unknown, a number impossible, or an
        option would change nothing, such as `bias_std` with batch normalization; images that are
        no floating array of rank 4.
    """

    depth: int
    width: int
    num_classes: int
    kernel_init: str | Callable[..., Any] = "orthonormal"
    kernel_gain: float = 1.0
    norm: str = "batch"
    bias_std: float = 0.0
    activation: str = "relu"
    parametrization: str = "direct"
    carry: float = 0.0
    bn_bias: float = 0.0
    bn_scale: float = 1.0
    bn_groups: int = 1
    modulated: bool = False
    dtype: Any = jnp.float32
    scan: bool = True
    unroll: int = 1
    remat: str = "none"

    block: ClassVar[type[nn.Module]] = PlainBlock
    _FLAGS: ClassVar[tuple[str, ...]] = ("modulated", "scan")

    def __post_init__(self):
        for name in ("depth", "width", "num_classes", "bn_groups", "unroll"):
            checks.integer(name, getattr(self, name), 1, 2**24)
        self._architecture()  # fails where there is none
        for name, known in (
            ("norm", NORMS),
            ("activation", ACTIVATIONS),
            ("parametrization", PARAMETRIZATIONS),
            ("remat", REMATS),
        ):
            checks.choice(name, getattr(self, name), known)
        for name in self._FLAGS:
            checks.flag(name, getattr(self, name))
        for name, interval in (
            ("kernel_gain", "[0, inf)"),
            ("bias_std", "[0, inf)"),
            ("bn_bias", "(-inf, inf)"),
            ("bn_scale", "(-inf, inf)"),
        ):
            checks.number(name, getattr(self, name), interval, traced=True)
            checks.fits(name, getattr(self, name), jnp.float32)
        checks.number("carry", self.carry, "[0, 1]")
        checks.dtype("dtype", self.dtype)
        if self.remat == "segments" and not self.scan:
            raise ConfigError("remat='segments' with scan=False: segments are of scanned blocks")
        if self.unroll > 1 and (self.remat == "segments" or not self.scan):
            raise ConfigError(
                f"unroll={self.unroll} changes nothing with scan={self.scan}, remat={self.remat!r}"
            )
        self._check_what_changes_nothing()
        named = isinstance(self.kernel_init, str) and self.kernel_init in KERNEL_INITS
        if not named and not callable(self.kernel_init):
            raise ConfigError(
                f"kernel_init={self.kernel_init!r} is unknown; take one of "
                f"{', '.join(KERNEL_INITS)}, or an initializer (key, shape, dtype) -> array"
            )
        super().__post_init__()

    @nn.nowrap
    def _architecture(self) -> Architecture:
        raise NotImplementedError

    @nn.nowrap
    def _check_what_changes_nothing(self):
        plain = type(self).__dataclass_fields__
        names = ("bn_bias", "bn_scale", "bn_groups") if self.norm == "none" else ("bias_std",)
        for name in names:
            if getattr(self, name) != plain[name].default:
                raise ConfigError(
                    f"{name}={getattr(self, name)} changes nothing where norm={self.norm!r}"
                )
        if self.carry and self.kernel_init != "carrying":
            raise ConfigError(
                f"carry={self.carry} changes nothing where kernel_init={self.kernel_init!r}"
            )
        if self.kernel_gain != 1 and (callable(self.kernel_init) or self.kernel_init in UNSCALED):
            raise ConfigError(
                f"kernel_gain={self.kernel_gain} is of orthonormal kernels, and changes nothing "
                f"where kernel_init={self.kernel_init!r}"
            )
        if self.parametrization == "repvgg" and (
            self.norm == "none" or self.modulated or self.activation == "crelu"
        ):
            raise ConfigError(
                f"parametrization='repvgg' is of branches with batch normalization, without sites: "
                f"norm={self.norm!r}, modulated={self.modulated}, activation={self.activation!r}"
            )
        if self.activation == "crelu" and self.block is not PlainBlock:
            raise ConfigError("activation='crelu' doubles the channels, which no shortcut does")
        if self.activation == "crelu" and self.parametrization == "dirac":
            raise ConfigError(
                "parametrization='dirac' needs as many outputs as inputs, which activation='crelu' "
                "never has"
            )

    def _spec(self, first: bool = False) -> LayerSpec:
        """Of the first layer, whose input is the image, or of those above an activation."""
        if callable(self.kernel_init):
            inits = (self.kernel_init,) * 2
        else:
            gain = {} if self.kernel_init in UNSCALED else {"gain": self.kernel_gain}
            same, change = KERNEL_INITS[self.kernel_init]
            share = {"share": self.carry} if self.kernel_init == "carrying" else gain
            inits = same(**share), change(**gain)
        if self.activation == "crelu" and not first:
            inits = tuple(map(mirrored, inits))
        return LayerSpec(
            *inits,
            activation=ACTIVATIONS[self.activation](self.depth - 1, self.carry),
            bn_bias=self.bn_bias,
            bn_scale=self.bn_scale,
            modulated=self.modulated,
            dtype=self.dtype,
            bn_groups=self.bn_groups,
            norm=self.norm,
            bias_std=self.bias_std,
            parametrization=self.parametrization,
            carry=self.carry,
        )

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        images = checks.array("images", images, 4, exactly=True)
        checks.flag("train", train)
        with counted_sites():
            return self._forward(images, train)

    @nn.nowrap
    def _forward(self, images, train):
        plan, spec = self._architecture(), self._spec()
        stem = ConvBN(
            self.width, self._spec(first=True), plan.stem_stride, plan.stem_window, name="stem"
        )
        x = stem(images.astype(self.dtype), train)
        if plan.max_pool:
            x = MaxPool(name="pool")(x)
        for index, blocks in enumerate(plan.blocks):
            stage = Stage(
                self.block,
                blocks=blocks,
                features=self.width * 2**index,
                stride=1 if index == 0 else 2,
                spec=spec,
                layout=plan.layout,
                scan=self.scan,
                unroll=self.unroll,
                remat=self.remat,
                name=f"stage_{index + 1}",
            )
            x = stage(x, train)
        if plan.last:
            x = ConvBN(self.width * plan.last, spec, name="last")(x, train)
        x = jnp.mean(x.astype(jnp.float32), axis=(1, 2))
        return nn.Dense(self.num_classes, kernel_init=spec.change_init, name="head")(x)


class MaxPool(nn.Module):
    """3×3 max pooling with stride 2: (N, H, W, C) to (N, ceil(H / 2), ceil(W / 2), C).

    A module, so that its output has a name. It stands between two modulation sites and needs none.
    """

    @nn.compact
    def __call__(self, x):
        return nn.max_pool(x, (3, 3), (2, 2), padding="SAME")


class PlainNet(ConvNet):
    """The net without shortcuts, of depth 6n + 2: 20, 44, 110, 1,004...; see `ConvNet`.

    That of He et al. (2016, section 4.2) and Xie et al. (2017, section 5.1): one 3×3 convolution,
    then 6n of them at `width`, 2·`width` and 4·`width` channels, halving the resolution at the
    second and third stage, and a head.

    Raises:
      ConfigError: depth is not 6n + 2; see also `ConvNet`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> net = PlainNet(depth=8, width=4, kernel_init="delta_orthonormal", bn_bias=1.0)
      >>> variables = net.init(jax.random.key(0), jnp.ones((2, 8, 8, 3)), train=False)
      >>> net.apply(variables, jnp.ones((2, 8, 8, 3)), train=False).shape
      (2, 10)
    """

    depth: int = 44
    width: int = 16
    num_classes: int = 10

    @nn.nowrap
    def _architecture(self) -> Architecture:
        if self.depth < 8 or (self.depth - 2) % 6:
            below = max(8, 6 * ((self.depth - 2) // 6) + 2)
            raise ConfigError(
                f"depth={self.depth} is not 6n + 2 (a stem, three stages of 2n layers, a head); "
                f"the nearest are {below} and {below + 6}"
            )
        return Architecture(blocks=((self.depth - 2) // 6,) * 3)


class ResNet(PlainNet):
    """The residual twin of `PlainNet`, with 3×3 projection shortcuts.

    Attributes:
      zero_init_residual: the last BN scale of every block begins at 0, and so the net as one of the
        projections alone (Goyal et al. 2017, arXiv:1706.02677).

    Raises:
      ConfigError: see `PlainNet`.
    """

    zero_init_residual: bool = False
    _FLAGS = (*PlainNet._FLAGS, "zero_init_residual")

    block = ResidualBlock

    def _spec(self, first: bool = False) -> LayerSpec:
        return dataclasses.replace(super()._spec(first), zero_last=self.zero_init_residual)

    @nn.nowrap
    def _check_what_changes_nothing(self):
        super()._check_what_changes_nothing()
        if self.zero_init_residual and self.norm == "none":
            raise ConfigError("zero_init_residual=True changes nothing where norm='none'")
