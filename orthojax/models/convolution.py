"""Convolution that is faster on CPUs: the native one, or else another gradient in plain JAX.

`orthojax.native` computes what it can. For the rest: XLA:CPU leaves its fast path for the gradient
of a convolution with respect to the kernel once that stands inside a loop (a scanned stage): 15 to
40 times slower than outside it was measured. And it is slow for images of few pixels anywhere. The
same sums, written differently, are not.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from orthojax import native
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
    convolution with no dilation or groups is the native one where `orthojax.native.fits`; with
    stride 1 and an odd window it gets at least a gradient of its own. Both are equal to XLA's up to
    rounding; everything else, and every other platform, is XLA's as it is. What counts is the
    program's platform and not the machine's: a program for a TPU may be compiled where there is
    none.

    Args and returns: those of `jax.lax.conv_general_dilated`.
    """
    ours = (
        lhs.ndim == 4
        and isinstance(padding, str)
        and padding == "SAME"
        and all(d == 1 for d in (*(lhs_dilation or ()), *(rhs_dilation or ())))
        and feature_group_count == 1
        and not any(kwargs.values())
        and _is_nhwc(dimension_numbers, lhs, rhs)
        and (
            native.fits(lhs, rhs, window_strides)
            or (
                all(stride == 1 for stride in window_strides)
                and all(size % 2 for size in rhs.shape[:2])
            )
        )
    )
    if ours:
        return _convolve(lhs, vary_like(lhs, rhs), window_strides[0], precision)
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


_nhwc = functools.partial(lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))


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
        return _nhwc(x, kernel, (1, 1), _pads(kernel))
    y = _patches(x, kernel) @ kernel.reshape(-1, kernel.shape[-1])
    return y.reshape(*x.shape[:3], kernel.shape[-1])


def _input_gradient(x, kernel, cotangent):
    del x
    return _correlate(cotangent, jnp.swapaxes(jnp.flip(kernel, (0, 1)), 2, 3))


def _kernel_gradient(x, kernel, cotangent):
    if x.shape[1] * x.shape[2] <= PATCHES_UP_TO:
        flat = cotangent.reshape(-1, cotangent.shape[-1])
        return (_patches(x, kernel).T @ flat).reshape(kernel.shape)
    # Batch is what is summed over, so it stands where a convolution has its input channels. The
    # barrier keeps XLA from folding the transposes back into a layout it has no fast path for.
    images = jnp.transpose(x, (3, 1, 2, 0))
    windows = jnp.transpose(cotangent, (1, 2, 0, 3))
    images, windows = lax.optimization_barrier((images, windows))
    gradient = _nhwc(images, windows, (1, 1), _pads(kernel))
    return jnp.transpose(gradient, (1, 2, 0, 3))


@functools.cache
def _same(stride, precision=None):
    return functools.partial(
        _nhwc, window_strides=(stride, stride), padding="SAME", precision=precision
    )


@functools.cache
def _in_jax(stride):
    """For CPUs without the native part: the convolution and its two gradients."""
    if stride == 1:
        return _correlate, _input_gradient, _kernel_gradient

    def gradient(argument):
        return lambda *primals_and_cotangent: _gradients(_same(stride), *primals_and_cotangent)[
            argument
        ]

    return _same(stride), gradient(0), gradient(1)


def _gradients(convolve, x, kernel, cotangent):
    return jax.vjp(convolve, x, kernel)[1](cotangent)


def _cpu(x, kernel, stride):
    convolve, _, _ = _in_jax(stride)
    if native.fits(x, kernel, (stride, stride)):
        return native.forward(x, kernel, stride, convolve)
    return convolve(x, kernel)


def _cpu_gradients(x, kernel, cotangent, stride):
    operands = (x, kernel, cotangent)
    _, input_gradient, kernel_gradient = _in_jax(stride)
    if native.fits(x, kernel, (stride, stride)):
        return (
            native.input_gradient(*operands, stride, input_gradient),
            native.kernel_gradient(*operands, stride, kernel_gradient),
        )
    return input_gradient(*operands), kernel_gradient(*operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x, kernel, stride, precision):
    cpu = functools.partial(_cpu, stride=stride)
    return lax.platform_dependent(x, kernel, cpu=cpu, default=_same(stride, precision))


def _forward(x, kernel, stride, precision):
    return _convolve(x, kernel, stride, precision), (x, kernel)


def _backward(stride, precision, residuals, cotangent):
    return lax.platform_dependent(
        *residuals,
        cotangent,
        cpu=functools.partial(_cpu_gradients, stride=stride),
        default=functools.partial(_gradients, _same(stride, precision)),
    )


_convolve.defvjp(_forward, _backward)
