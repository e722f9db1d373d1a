"""Kernels with the identity inside them (Zagoruyko and Komodakis 2017, arXiv:1706.00388)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax


def dirac(module: nn.Module, features: int, convolve: Callable | None = None) -> Callable:
    r"""A convolution with :math:`a_m \delta + b_m W_m / \|W_m\|` instead of each filter W_m.

    :math:`\delta` is the kernel of the identity; a and b are trained, one for each output, and
    begin at 1 and 0.1.

    Args:
      module: bound; gets the parameters `dirac_identity`, a, and `dirac_scale`, b, float32 (M,).
      features: M.
      convolve: like `jax.lax.conv_general_dilated`, which None is.

    Returns:
      The same with the kernel replaced, for `flax.linen.Conv(conv_general_dilated=...)`.
    """

    def trained(name, value):
        return module.param(name, nn.initializers.constant(value), (features,), jnp.float32)

    identity, scale = trained("dirac_identity", 1.0), trained("dirac_scale", 0.1)

    def call(lhs, rhs, *args, **kwargs):
        kernel = dirac_kernel(rhs.astype(jnp.float32), identity, scale).astype(rhs.dtype)
        return (convolve or lax.conv_general_dilated)(lhs, kernel, *args, **kwargs)

    return call


def dirac_kernel(kernel: jax.Array, identity: jax.Array, scale: jax.Array) -> jax.Array:
    """The kernel that is convolved with, (H, W, C, C), for filters W of the same shape.

    Example:
      >>> kernel = dirac_kernel(jnp.ones((3, 3, 2, 2)), jnp.ones(2), jnp.zeros(2))
      >>> kernel[1, 1].tolist(), float(jnp.abs(kernel).sum())
      ([[1.0, 0.0], [0.0, 1.0]], 2.0)
    """
    height, width, channels, _ = kernel.shape
    center = (height - 1) // 2, (width - 1) // 2
    delta = jnp.zeros_like(kernel).at[center].set(jnp.eye(channels, dtype=kernel.dtype))
    power = jnp.sum(jnp.square(kernel), axis=(0, 1, 2), keepdims=True)
    unit = kernel * lax.rsqrt(jnp.maximum(power, 1e-12))
    expand = (1, 1, 1, -1)
    return identity.reshape(expand) * delta + scale.reshape(expand) * unit
