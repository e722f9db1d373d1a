"""The native convolution and its two gradients as JAX primitives.

Each takes, besides its operands, an equivalent in plain JAX. A program that is lowered for one CPU
calls the native part, if that could be built; for any other platform, for CPUs among which XLA is
to divide arrays, and for `jax.export`, the equivalent is lowered in its place. So nothing native is
in a program for a GPU or a TPU, or in a file for other machines. Under
`jax.shard_map` each device has its own call. `jax.vmap` and forward-mode differentiation go through
the equivalent.
"""

import re
from collections.abc import Callable

import jax
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from orthojax.native import build

#: How the C++ part computes: by its own choice, by direct sums, or by Winograd's F(2×2, 3×3).
ALGORITHMS = {"automatic": 0, "direct": 1, "winograd": 2}


def fits(x, kernel, strides) -> bool:
    """Whether a "SAME" convolution in NHWC and HWIO is one that the native part computes.

    That is: float32, windows of 1×1 or 3×3, strides of 1 or 2, channels in multiples of 8. The
    input may also have fewer than 8 channels, like images; its gradient is then the equivalent.

    Args:
      x: (N, H, W, C).
      kernel: (kh, kw, C, features).
      strides: two of them.

    Example:
      >>> x, kernel = jax.numpy.ones((1, 5, 5, 8)), jax.numpy.ones((3, 3, 8, 16))
      >>> fits(x, kernel, (2, 2)), fits(x, kernel[..., :12], (2, 2))
      (True, False)
    """
    return (
        x.ndim == kernel.ndim == 4
        and x.dtype == kernel.dtype == np.float32
        and kernel.shape[:2] in ((1, 1), (3, 3))
        and tuple(strides) in ((1, 1), (2, 2))
        and x.shape[3] == kernel.shape[2]
        and (kernel.shape[2] < 8 or kernel.shape[2] % 8 == 0)
        and kernel.shape[3] % 8 == 0
        and 0 not in (*x.shape, *kernel.shape)
    )


def forward(x, kernel, stride: int, equivalent: Callable, algorithm: str = "automatic"):
    """The "SAME" convolution.

    Args:
      x: (N, H, W, C) for which `fits` holds, like the others.
      kernel: (window, window, C, features).
      stride: 1 or 2, of both axes.
      equivalent: the same function of `x, kernel` in plain JAX; hashable, and equal to itself from
        call to call, or each one traces anew.
      algorithm: one of `ALGORITHMS`.

    Returns:
      (N, ceil(H / stride), ceil(W / stride), features).
    """
    return _bind(_forward_p, (x, kernel), stride, equivalent, algorithm)


def input_gradient(
    x, kernel, cotangent, stride: int, equivalent: Callable, algorithm: str = "automatic"
):
    """The gradient with respect to x, as `forward`; `equivalent` is of `x, kernel, cotangent`."""
    if x.shape[3] < 8:
        return equivalent(x, kernel, cotangent)
    return _bind(_input_gradient_p, (x, kernel, cotangent), stride, equivalent, algorithm)


def kernel_gradient(
    x, kernel, cotangent, stride: int, equivalent: Callable, algorithm: str = "automatic"
):
    """The gradient with respect to the kernel, as `forward`; see `input_gradient`."""
    return _bind(_kernel_gradient_p, (x, kernel, cotangent), stride, equivalent, algorithm)


def describe(lowered: jax.stages.Lowered) -> str:
    """Whose convolutions a lowered program has: `XLA`, or `native` with the library's digest.

    Example:
      >>> describe(jax.jit(jax.numpy.sin).lower(1.0))
      'XLA'
    """
    found = re.search(r"orthojax_forward_([0-9a-f]+)", lowered.as_text())
    return f"native {found[1]}" if found else "XLA"


def _bind(primitive, operands, stride, equivalent, algorithm):
    return primitive.bind(
        *operands, stride=stride, equivalent=equivalent, algorithm=ALGORITHMS[algorithm]
    )


def _output(x, kernel, *, stride, **_):
    rows, columns = (-(-size // stride) for size in x.shape[1:3])
    return x.update(shape=(x.shape[0], rows, columns, kernel.shape[3]), weak_type=False)


def _define(handler, abstract_eval, operands):
    """A primitive whose handler is given those of its operands that are counted in `operands`."""
    primitive = Primitive(f"orthojax_{handler}")
    primitive.def_abstract_eval(abstract_eval)
    primitive.def_impl(
        lambda *args, **params: jax.jit(lambda *args: primitive.bind(*args, **params))(*args)
    )

    def in_jax(*args, equivalent, **_):
        return equivalent(*args)

    lower_in_jax = mlir.lower_fun(in_jax, multiple_results=False)

    def lower_for_cpu(ctx, *args, stride, equivalent, algorithm):
        context = ctx.module_context
        # What is exported is to run on other machines.
        here = _on_one_device(context.axis_context) and not context.lowering_parameters.for_export
        names = build.targets() if here else None
        if names is None:
            return lower_in_jax(
                ctx, *args, stride=stride, equivalent=equivalent, algorithm=algorithm
            )
        ctx = ctx.replace(avals_in=[ctx.avals_in[i] for i in operands])
        lower = jax.ffi.ffi_lowering(names[handler])
        attributes = {"stride": np.int64(stride), "algorithm": np.int64(algorithm)}
        return lower(ctx, *(args[i] for i in operands), **attributes)

    mlir.register_lowering(primitive, lower_in_jax)
    mlir.register_lowering(primitive, lower_for_cpu, platform="cpu")

    def batch(args, axes, *, equivalent, **_):
        return jax.vmap(equivalent, axes)(*args), 0

    def jvp(primals, tangents, *, equivalent, **_):
        return jax.jvp(equivalent, primals, tuple(map(ad.instantiate_zeros, tangents)))

    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = jvp
    return primitive


def _on_one_device(axis_context) -> bool:
    """Whether every array of what is lowered lies on one device, whole."""
    devices = getattr(axis_context, "num_devices", None)
    if devices is not None:
        return devices == 1
    mesh = getattr(axis_context, "mesh", None)
    if mesh is None:
        return False
    return mesh.size == 1 or set(mesh.axis_names) <= set(axis_context.manual_axes)


_forward_p = _define("forward", _output, (0, 1))
_input_gradient_p = _define("input_gradient", lambda x, kernel, _, **__: x, (2, 1))
_kernel_gradient_p = _define("kernel_gradient", lambda x, kernel, _, **__: kernel, (0, 2))
