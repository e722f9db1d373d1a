"""The native convolution against direct sums in float64, and under JAX's transformations."""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from orthojax import native
from orthojax.models.convolution import conv_general_dilated
from orthojax.native import build

pytestmark = pytest.mark.skipif(build.targets() is None, reason="nothing native here")

CASES = [  # images, rows, columns, channels, features, window, stride
    (128, 8, 8, 8, 8, 3, 1),
    (30, 4, 4, 16, 16, 3, 1),
    (1, 1, 1, 8, 8, 3, 2),
    (1, 7, 5, 24, 16, 3, 1),
    (3, 33, 18, 16, 40, 3, 1),
    (2, 1, 9, 16, 16, 3, 1),
    (9, 8, 8, 8, 16, 3, 2),
    (3, 32, 20, 8, 48, 3, 2),
    (4, 9, 9, 32, 8, 1, 1),
    (7, 17, 32, 24, 16, 1, 2),
    (25, 3, 2, 8, 8, 1, 2),
    (9, 8, 8, 1, 8, 3, 1),
    (2, 13, 14, 7, 24, 3, 2),
]
DIMENSIONS = ("NHWC", "HWIO", "NHWC")


def arrays(case, seed=0):
    """x, kernel and a cotangent."""
    images, rows, columns, channels, features, window, stride = case
    draw = np.random.default_rng(seed).standard_normal
    outputs = (-(-rows // stride), -(-columns // stride))
    return (
        draw((images, rows, columns, channels), np.float32),
        draw((window, window, channels, features), np.float32),
        draw((images, *outputs, features), np.float32),
    )


def direct_sums(x, kernel, cotangent, stride):
    """The convolution and its gradients in float64."""
    x, kernel, cotangent = (a.astype(np.float64) for a in (x, kernel, cotangent))
    window, outputs = kernel.shape[0], cotangent.shape[1:3]
    pads = [
        max((out - 1) * stride + window - size, 0)
        for out, size in zip(outputs, x.shape[1:3], strict=True)
    ]
    width = [(0, 0), *((pad // 2, pad - pad // 2 + stride) for pad in pads), (0, 0)]
    padded = np.pad(x, width)
    y, dx, dkernel = np.zeros_like(cotangent), np.zeros_like(padded), np.zeros_like(kernel)
    for i in range(window):
        for j in range(window):
            rows = slice(i, i + stride * outputs[0], stride)
            columns = slice(j, j + stride * outputs[1], stride)
            y += padded[:, rows, columns] @ kernel[i, j]
            dx[:, rows, columns] += cotangent @ kernel[i, j].T
            dkernel[i, j] = np.einsum("nhwc,nhwk->ck", padded[:, rows, columns], cotangent)
    top, left = (pad // 2 for pad in pads)
    return y, dx[:, top : top + x.shape[1], left : left + x.shape[2]], dkernel


def never(*_):
    raise AssertionError("XLA's convolution is not wanted here")


def natively(x, kernel, cotangent, stride, algorithm="automatic"):
    """The convolution and its gradients by the native part, or an error."""
    options = (stride, never, algorithm)
    return (
        native.forward(x, kernel, *options),
        native.input_gradient(x, kernel, cotangent, *options) if x.shape[3] >= 8 else None,
        native.kernel_gradient(x, kernel, cotangent, *options),
    )


def error(found, expected):
    """The largest difference relative to the largest entry; None is no result."""
    return max(
        np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
        for a, b in zip(found, expected, strict=True)
        if a is not None
    )


def xla(x, kernel, stride):
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=DIMENSIONS
    )


def models(x, kernel, stride):
    """What the models call."""
    return conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=DIMENSIONS)


def gradients(convolve, stride=1):
    """Of a function that is not linear in the convolution, so that cotangents differ."""
    return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel, stride))), (0, 1))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_computes_direct_sums(case):
    operands, stride = arrays(case), case[-1]
    algorithms = ["direct", "winograd"] if case[-2:] == (3, 1) and case[3] >= 8 else ["automatic"]
    for algorithm in algorithms:
        found = jax.jit(functools.partial(natively, stride=stride, algorithm=algorithm))(*operands)
        assert error(found, direct_sums(*operands, stride)) < 3e-6, algorithm


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_xlas(stride):
    x, kernel, _ = arrays((6, 9, 7, 16, 24, 3, stride))
    found = jax.jit(gradients(models, stride))(x, kernel)
    assert "orthojax_" in jax.jit(gradients(models, stride)).lower(x, kernel).as_text()
    assert error(found, jax.jit(gradients(xla, stride))(x, kernel)) < 1e-5


def test_scan_and_checkpoint():
    x, _, _ = arrays((3, 8, 8, 8, 8, 3, 1))
    kernels = np.random.default_rng(2).standard_normal((4, 3, 3, 8, 8), np.float32) / 6

    def loss(convolve, x, kernels):
        def layer(x, kernel):
            return jnp.tanh(convolve(x, kernel, 1)), None

        return jnp.sum(jnp.square(lax.scan(jax.checkpoint(layer), x, kernels)[0]))

    found, expected = (
        jax.jit(jax.grad(functools.partial(loss, convolve), (0, 1)))(x, kernels)
        for convolve in (models, xla)
    )
    assert error(found, expected) < 1e-5


def test_vmap_and_second_derivatives_use_xla():
    x, kernel, _ = arrays((2, 5, 6, 8, 16, 3, 1))
    xs, kernels = np.stack([x, 2 * x]), np.stack([kernel, kernel - 1])
    for axes in ((0, 0), (None, 0)):
        operands = [
            many if axis == 0 else one
            for axis, many, one in zip(axes, (xs, kernels), (x, kernel), strict=True)
        ]
        found, expected = (
            jax.jit(jax.vmap(gradients(convolve), axes))(*operands) for convolve in (models, xla)
        )
        assert error(found, expected) < 1e-5

    def curvature(convolve):
        def slope(t):
            return jnp.sum(gradients(convolve)(t * x, kernel)[0] * x)

        return [jax.jit(jax.grad(slope))(0.1)]

    assert error(curvature(models), curvature(xla)) < 1e-4


@pytest.mark.parametrize("manual", [True, False])
def test_on_several_devices(manual):
    """Each device calls for its own part under `shard_map`; where XLA divides, it is XLA's."""
    x, kernel, _ = arrays((4, 8, 8, 16, 16, 3, 1))
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    split = PartitionSpec("data")
    function = gradients(models)
    if manual:
        function = jax.shard_map(
            function,
            mesh=mesh,
            in_specs=(split, PartitionSpec()),
            out_specs=(split, PartitionSpec()),
        )
    placed = jax.device_put(x, NamedSharding(mesh, split))
    whole = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec()))
    compiled = jax.jit(function)
    assert ("orthojax_" in compiled.lower(placed, whole).as_text()) == manual
    assert error(compiled(placed, whole), jax.jit(gradients(xla))(x, kernel)) < 1e-5


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_nothing_native_is_in_programs_for_accelerators(platform):
    x, kernel, _ = arrays((2, 8, 8, 8, 8, 3, 1))
    traced = jax.jit(gradients(models)).trace(x, kernel)
    assert "orthojax_" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "orthojax_" not in traced.lower(lowering_platforms=(platform,)).as_text()


def test_what_does_not_fit_is_xlas():
    x, kernel, _ = arrays((2, 6, 6, 8, 8, 3, 1))
    for dtype, features in ((jnp.bfloat16, 8), (jnp.float32, 4)):
        operands = (x.astype(dtype), kernel[..., :features].astype(dtype))
        assert "orthojax_" not in jax.jit(gradients(models)).lower(*operands).as_text()


def repeat(times, seed=0):
    """Whether equal calls give equal bits."""
    operands = arrays((32, 16, 16, 16, 16, 3, 1), seed)
    function = jax.jit(functools.partial(natively, stride=1))
    first = [np.asarray(a) for a in function(*operands)]
    return all(
        np.array_equal(a, b)
        for _ in range(times)
        for a, b in zip(first, function(*operands), strict=True)
    )


def test_two_threads_repeat_themselves():
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert all(pool.map(functools.partial(repeat, 50), (0, 1)))


@pytest.mark.slow
def test_ten_thousand_times():
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        assert all(pool.map(functools.partial(repeat, 5000), (0, 1)))
