"""Convolution with a faster gradient on CPUs.

XLA:CPU leaves its fast path for the gradient of a convolution with respect to the kernel once
that stands inside a loop (a scanned stage): 15 to 40 times slower than outside it was measured.
And it is slow for images of few pixels anywhere. The same sums, written differently, are not.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from orthojax.sites import vary_like

# Up to this many output positions one matrix product over patches beats XLA:CPU's convolution.
PATCHES_UP_TO = 16


def conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=None,
    rhs_dilation=None,
    dimension_numbers=None,
    feature_group_count=1,
    precision=None,
    **kwargs,
):
    """`jax.lax.conv_general_dilated`, formulated for the platform that it is compiled for.

    Drop-in for `flax.linen.Conv(conv_general_dilated=...)`. Compiled for CPUs, a 2-D NHWC "SAME"
    convolution with stride 1, odd window, and no dilation or groups gets a gradient of its own,
    equal to XLA's up to rounding; everything else, and every other platform, is XLA's as it is.
    What counts is the program's platform and not the machine's: a program for a TPU may be
    compiled where there is none.

    Args and returns: those of `jax.lax.conv_general_dilated`.
    """
    ours = (
        lhs.ndim == 4
        and isinstance(padding, str)
        and padding == "SAME"
        and all(stride == 1 for stride in window_strides)
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and feature_group_count == 1
        and not any(kwargs.values())
        and all(size % 2 for size in rhs.shape[:2])
        and _is_nhwc(dimension_numbers, lhs, rhs)
    )
    if ours:
        return _convolve(lhs, vary_like(lhs, rhs), precision)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
        **kwargs,
    )


def _is_nhwc(numbers, lhs, rhs):
    nhwc = ("NHWC", "HWIO", "NHWC")
    return numbers is not None and lax.conv_dimension_numbers(
        lhs.shape, rhs.shape, numbers
    ) == lax.conv_dimension_numbers(lhs.shape, rhs.shape, nhwc)


_nhwc = functools.partial(
    lax.conv_general_dilated,
    window_strides=(1, 1),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
)


def _pads(kernel):
    return tuple((size // 2, size // 2) for size in kernel.shape[:2])


def _patches(x, kernel):
    """All windows of `x`, (N, H, W, C) -> (N·H·W, kh·kw·C) in the order of an HWIO kernel."""
    height, width = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), *_pads(kernel), (0, 0)))
    windows = [
        padded[:, i : i + height, j : j + width]
        for i in range(kernel.shape[0])
        for j in range(kernel.shape[1])
    ]
    return jnp.concatenate(windows, axis=-1).reshape(-1, kernel[..., 0].size)


def _correlate(x, kernel):
    if x.shape[1] * x.shape[2] > PATCHES_UP_TO:
        return _nhwc(x, kernel, padding=_pads(kernel))
    y = _patches(x, kernel) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(*x.shape[:3], kernel.shape[-1])


def _kernel_gradient(x, kernel, cotangent):
    if x.shape[1] * x.shape[2] <= PATCHES_UP_TO:
        flat = cotangent.reshape(-1, cotangent.shape[-1])
        return (_patches(x, kernel).T @ flat).reshape(kernel.shape)
    # Batch is what is summed over, so it stands where a convolution has its input channels. The
    # barrier keeps XLA from folding the transposes back into a layout it has no fast path for.
    images = jnp.transpose(x, (3, 1, 2, 0))
    windows = jnp.transpose(cotangent, (1, 2, 0, 3))
    images, windows = lax.optimization_barrier((images, windows))
    gradient = _nhwc(images, windows, padding=_pads(kernel))
    return jnp.transpose(gradient, (1, 2, 0, 3))


def _cpu_gradients(x, kernel, cotangent):
    mirrored = jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3)
    return _correlate(cotangent, mirrored), _kernel_gradient(x, kernel, cotangent)


def _same(precision):
    return functools.partial(_nhwc, padding="SAME", precision=precision)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(x, kernel, precision):
    return lax.platform_dependent(x, kernel, cpu=_correlate, default=_same(precision))


def _forward(x, kernel, precision):
    return _convolve(x, kernel, precision), (x, kernel)


def _backward(precision, residuals, cotangent):
    def gradients(x, kernel, cotangent):
        return jax.vjp(_same(precision), x, kernel)[1](cotangent)

    return lax.platform_dependent(*residuals, cotangent, cpu=_cpu_gradients, default=gradients)


_convolve.defvjp(_forward, _backward)
