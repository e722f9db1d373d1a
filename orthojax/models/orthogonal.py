"""A convolution that is an isometry as an operator."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from orthojax import checks
from orthojax.matrices import accumulation_dtype
from orthojax.ortho.isometric_conv import (
    AXES,
    LARGEST_WINDOW,
    PADDINGS,
    PER_AXIS,
    isometric_conv,
    isometric_kernel,
    parameter_shapes,
)


class OrthogonalConv(nn.Module):
    """A convolution whose operator has singular values of 1, whatever its parameters are.

    In the place of `nn.Conv`, called with `(N, *sides, C)`, one to three sides. Any optimizer
    trains it: the parameters, `projectors` and `mixing`, are unconstrained, and are no kernels to
    `optax_ortho`. With circular padding, and `s` the product of the strides:

    - `C·s <= features`: an isometry, `‖conv(x)‖ = ‖x‖`;
    - `C·s >= features`: the adjoint of one; 1-Lipschitz, and cotangents keep their norm.

    With `"SAME"` (zeros) it is 1-Lipschitz. See `orthojax.ortho.isometric_conv`, whose functions
    can be used without Flax.

    Attributes:
      features: `M`, output channels.
      kernel_size: The window; with strides, rounded up to a multiple of them.
      strides: One for all axes or one each. The strides must divide the sides (circular padding).
      padding: `"CIRCULAR"` or `"SAME"`.
      feature_group_count: Groups of channels that are kept apart.
      use_bias: Whether a bias is added; it does not change distances.
      dtype: Compute dtype of the convolution, by default that of the input. In bfloat16 singular
        values are 1 up to the rounding of the kernel, some 1e-3.
      param_dtype: Of the parameters; the kernel is computed in it, in 16 bits in float32.
      precision: Of the convolution.

    Raises:
      ConfigError: An impossible number, name or dtype; as `isometric_kernel` and `isometric_conv`.

    Example:
      >>> layer = OrthogonalConv(16, (3, 3))
      >>> x = jax.random.normal(jax.random.key(0), (2, 8, 8, 4))
      >>> y, _ = layer.init_with_output(jax.random.key(1), x)
      >>> y.shape, bool(jnp.allclose(jnp.linalg.norm(x), jnp.linalg.norm(y), rtol=1e-5))
      ((2, 8, 8, 16), True)
    """

    features: int
    kernel_size: Sequence[int]
    strides: int | Sequence[int] = 1
    padding: str = "CIRCULAR"
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: jax.lax.PrecisionLike = jax.lax.Precision.HIGHEST

    def __post_init__(self):
        for name in ("features", "feature_group_count"):
            checks.integer(name, getattr(self, name), 1)
        limits = dict(high=LARGEST_WINDOW, lengths=AXES)
        checks.integers("kernel_size", self.kernel_size, 1, PER_AXIS, **limits)
        if not isinstance(self.strides, int):
            lengths = (len(self.kernel_size),)
            checks.integers("strides", self.strides, 1, PER_AXIS, **{**limits, "lengths": lengths})
        checks.strides("strides", self.strides)
        checks.choice("padding", self.padding, PADDINGS)
        checks.flag("use_bias", self.use_bias)
        checks.dtype("param_dtype", self.param_dtype)
        if self.dtype is not None:
            checks.dtype("dtype", self.dtype)
        super().__post_init__()

    @nn.compact
    def __call__(self, x):
        window = tuple(self.kernel_size)
        x = checks.array("x", x, len(window) + 2, exactly=True)
        inputs, strides = x.shape[-1], self.strides
        strides = tuple(strides) if isinstance(strides, Sequence) else (strides,) * len(window)
        shapes = parameter_shapes(window, inputs, self.features, strides, self.feature_group_count)
        projectors, mixing = (
            self.param(name, _scaled_normal, shape, self.param_dtype)
            for name, shape in zip(("projectors", "mixing"), shapes, strict=True)
        )
        # LAPACK and cuSOLVER, which `cayley` needs, have no 16 bits.
        wide = (leaf.astype(accumulation_dtype(self.param_dtype)) for leaf in (projectors, mixing))
        kernel = isometric_kernel(*wide, window, inputs, self.features, strides)
        dtype = self.dtype or x.dtype
        y = isometric_conv(
            x.astype(dtype),
            kernel.astype(dtype),
            strides,
            self.padding,
            self.feature_group_count,
            self.precision,
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
            y += bias.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        return y


def _scaled_normal(key, shape, dtype):
    """Normal, so that the eigenvalues of Cayley's skew matrix are of order one."""
    return jax.random.normal(key, shape, dtype) / max(1, shape[-1]) ** 0.5
