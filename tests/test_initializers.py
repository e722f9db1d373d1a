"""Properties of the initializers: what they promise to be orthonormal, measured."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthojax.errors import ConfigError
from orthojax.initializers import (
    carrying,
    delta_orthonormal,
    mirrored,
    orthonormal,
    orthonormal_columns,
)
from orthojax.matrices import KernelAxes, group_sizes
from orthojax.ortho import orthonormality_error


def draw(initializer, seed, shape, dtype=jnp.float32):
    """One kernel, compiled as one program."""
    return jax.jit(lambda key: initializer(key, shape, dtype))(jax.random.key(seed))


def singular_values(matrix):
    return np.linalg.svd(np.asarray(matrix, np.float64), compute_uv=False)


@pytest.mark.parametrize("shape", [(7, 5), (6, 6), (3, 3, 4, 8)])
def test_tall_kernels_have_orthonormal_columns(shape):
    gain = 1.4
    kernel = draw(orthonormal(gain=gain), 1, shape)
    assert kernel.shape == shape and kernel.dtype == jnp.float32
    np.testing.assert_allclose(singular_values(kernel.reshape(-1, shape[-1])), gain, rtol=1e-6)


@pytest.mark.parametrize("groups", ["ceil", "literal"])
@pytest.mark.parametrize("shape", [(5, 17), (1, 3), (4, 8)])
def test_wide_kernels_are_orthonormal_group_by_group(groups, shape):
    kernel = np.asarray(draw(orthonormal(groups), 2, shape)).reshape(-1, shape[-1])
    sizes = group_sizes(kernel.shape[0], shape[-1], groups)
    for group in np.split(kernel, np.cumsum(sizes)[:-1], axis=1):
        np.testing.assert_allclose(singular_values(group), 1, rtol=1e-6)


def test_groups_of_the_first_layer_are_27_27_10_and_independent():
    kernel = np.asarray(draw(orthonormal(), 3, (3, 3, 3, 64))).reshape(27, 64)
    gram = kernel.T @ kernel
    for start, stop in [(0, 27), (27, 54), (54, 64)]:
        np.testing.assert_allclose(
            gram[start:stop, start:stop], np.eye(stop - start), atol=1e-6, rtol=0
        )
    # Unit vectors of independent groups in 27 dimensions have mean squared cosine 1/27.
    np.testing.assert_allclose(np.mean(gram[:27, 27:54] ** 2), 1 / 27, rtol=1e-5)
    assert np.abs(kernel[:, :27] - kernel[:, 27:54]).max() > 0.1


def test_large():
    kernel = np.asarray(draw(orthonormal(), 4, (1536, 512)))
    assert np.abs(kernel.T @ kernel - np.eye(512)).max() < 5e-6


@pytest.mark.parametrize("make", [orthonormal, delta_orthonormal])
def test_low_precision_is_the_rounding_of_an_orthonormal_kernel(make):
    dtype = jnp.bfloat16
    exact = draw(make(), 5, (3, 3, 16, 16))
    kernel = draw(make(), 5, (3, 3, 16, 16), dtype)
    assert kernel.dtype == dtype
    np.testing.assert_array_equal(kernel, exact.astype(dtype))
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    values = singular_values(kernel.astype(jnp.float32).reshape(-1, 16))
    np.testing.assert_allclose(values, 1, atol=tolerance)


@pytest.mark.parametrize("make", [orthonormal, delta_orthonormal])
def test_float64(make):
    with jax.enable_x64(True):
        kernel = draw(make(), 6, (3, 3, 8, 8), jnp.float64)
        assert kernel.dtype == jnp.float64
        np.testing.assert_allclose(singular_values(kernel.reshape(-1, 8)), 1, rtol=1e-14)


@pytest.mark.parametrize("make", [orthonormal, delta_orthonormal])
def test_seeds_are_independent_and_keys_reproduce(make):
    shape, count = (1, 1, 8, 8), 400
    draw_all = jax.jit(jax.vmap(lambda key: make()(key, shape)))
    kernels = draw_all(jax.random.split(jax.random.key(7), count))
    matrices = np.asarray(kernels, np.float64).reshape(count, 8, 8)
    # Haar: every entry has mean 0 and mean square 1/8, the mean trace of Q_iᵀ Q_j is 0 with
    # variance 1. Without the sign fix the diagonal would have a negative mean.
    assert np.abs(matrices.mean(0)).max() < 5 / np.sqrt(8 * count)
    np.testing.assert_allclose((matrices**2).mean(0), 1 / 8, rtol=0.35)
    overlaps = np.einsum("nij,nij->n", matrices[::2], matrices[1::2])
    assert abs(overlaps.mean()) < 5 / np.sqrt(count / 2)
    np.testing.assert_allclose(overlaps.var(), 1, rtol=0.5)
    np.testing.assert_array_equal(draw(make(), 8, shape), draw(make(), 8, shape))


def transfer_matrices(kernel, side):
    """`(side², C, M)`: what the convolution with circular padding does at each frequency."""
    padded = np.zeros((side, side, *kernel.shape[2:]))
    padded[: kernel.shape[0], : kernel.shape[1]] = kernel
    return np.fft.fft2(padded, axes=(0, 1)).reshape(-1, *kernel.shape[2:])


@pytest.mark.parametrize("channels", [(8, 8), (8, 5), (5, 8)])
@pytest.mark.parametrize("window", [(3, 3), (4, 1)])
def test_delta_kernels_are_semi_orthogonal_at_every_frequency(channels, window):
    kernel = np.asarray(draw(delta_orthonormal(1.5, feature_groups=1), 9, (*window, *channels)))
    values = np.linalg.svd(transfer_matrices(kernel, 7), compute_uv=False)
    assert values.shape == (49, min(channels))
    np.testing.assert_allclose(values, 1.5, rtol=1e-6)


@pytest.mark.parametrize("channels", [(4, 9), (9, 4)])
def test_strided_layers_keep_the_norm_of_what_they_read(channels):
    kernel = draw(delta_orthonormal(feature_groups=1), 14, (3, 3, *channels))
    images = jax.random.normal(jax.random.key(15), (2, 8, 8, channels[0]))

    def layer(x):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    outputs = layer(images)
    read = np.asarray(images)[:, 1::2, 1::2]
    if channels[0] <= channels[1]:
        np.testing.assert_allclose(np.linalg.norm(outputs), np.linalg.norm(read), rtol=1e-5)
    if channels[0] >= channels[1]:
        (below,) = jax.jit(lambda x, cotangent: jax.vjp(layer, x)[1](cotangent))(images, outputs)
        np.testing.assert_allclose(np.linalg.norm(below), np.linalg.norm(outputs), rtol=1e-5)


@pytest.mark.parametrize("make", [orthonormal, delta_orthonormal])
def test_in_flax_layers(make):
    nn = pytest.importorskip("flax.linen")
    for layer, x in [
        (nn.Dense(3, kernel_init=make()), jnp.ones((2, 4))),
        (nn.DenseGeneral((2, 3), kernel_init=make()), jnp.ones((2, 8))),
        (nn.Conv(6, (3, 3), kernel_init=make(), param_dtype=jnp.bfloat16), jnp.ones((1, 4, 4, 6))),
    ]:
        kernel = np.asarray(jax.jit(layer.init)(jax.random.key(17), x)["params"]["kernel"], "f8")
        matrix = kernel.reshape(kernel.shape[0] if x.ndim == 2 else 54, -1)
        np.testing.assert_allclose(singular_values(matrix), 1, atol=2e-2)


@pytest.mark.parametrize(("groups", "outputs"), [(1, 16), (2, 4), (8, 16)])
def test_delta_kernels_of_grouped_convolutions_are_isometries(groups, outputs):
    nn = pytest.importorskip("flax.linen")
    layer = nn.Conv(
        outputs,
        (3, 3),
        feature_group_count=groups,
        use_bias=False,
        padding="CIRCULAR",
        kernel_init=delta_orthonormal(1.5, groups),
    )
    units = np.eye(72, dtype=np.float32).reshape(72, 3, 3, 8)
    operator, _ = jax.jit(lambda x: layer.init_with_output(jax.random.key(0), x))(units)
    np.testing.assert_allclose(singular_values(operator.reshape(72, -1)), 1.5, rtol=1e-5)


def test_groups_that_do_not_divide_the_outputs_are_named():
    with pytest.raises(ConfigError, match="4 outputs.*feature_groups=8"):
        delta_orthonormal(feature_groups=8)(jax.random.key(0), (3, 3, 1, 4))


@pytest.mark.parametrize(
    ("shape", "groups"), [((3, 3, 1, 8), 8), ((1, 1, 3, 8), 4), ((1, 3, 8), 2)]
)
def test_orthonormal_kernels_of_grouped_convolutions(shape, groups):
    kernel = draw(orthonormal(feature_groups=groups), 0, shape)
    axes = KernelAxes(inputs=tuple(range(len(shape) - 1)), outputs=-1, feature_groups=groups)
    errors = orthonormality_error({"kernel": kernel}, view={"kernel": axes})
    assert errors["kernel"] < 1e-6
    blocks = np.asarray(kernel).reshape(-1, groups, shape[-1] // groups)
    assert np.abs(blocks[:, 0] - blocks[:, 1]).max() > 0.01  # groups are independent


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_kernels_are_rounded_orthonormal_ones(dtype):
    key = jax.random.key(0)
    for kernel in (
        orthonormal(gain=np.float64(2.0))(key, (6, 4), dtype),
        2 * delta_orthonormal()(key, (6, 4), dtype),
        2 * orthonormal_columns(key, 6, 4, dtype),
        2**0.5 * mirrored(orthonormal())(key, (12, 4), dtype),
    ):
        assert kernel.dtype == dtype
        matrix = np.asarray(kernel, np.float64)
        np.testing.assert_allclose(matrix.T @ matrix, 4 * np.eye(4), atol=0.1)


def test_a_delta_kernel_of_one_input_that_may_be_depthwise_warns():
    with pytest.warns(UserWarning, match=r"\(3, 3, 1, 8\).*feature_groups=1"):
        delta_orthonormal()(jax.random.key(0), (3, 3, 1, 8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        delta_orthonormal()(jax.random.key(0), (3, 3, 8, 8))
        delta_orthonormal()(jax.random.key(0), (3, 3, 3, 8))
        delta_orthonormal()(jax.random.key(0), (4, 8))
        delta_orthonormal(feature_groups=1)(jax.random.key(0), (3, 3, 1, 8))


@pytest.mark.parametrize("make", [orthonormal, delta_orthonormal])
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (3, 3, 0, 8)])
def test_kernels_without_elements(make, shape):
    kernel = draw(make(feature_groups=2 if shape[-1] else 1), 0, shape, jnp.bfloat16)
    assert kernel.shape == shape and kernel.dtype == jnp.bfloat16


def test_errors():
    for make in (orthonormal, delta_orthonormal):
        with pytest.raises(ConfigError, match=r"\(4,\)"):
            draw(make(), 0, (4,))
        with pytest.raises(ConfigError, match="int32"):
            draw(make(), 0, (4, 4), jnp.int32)
    for groups in ("none", "ceiling"):
        with pytest.raises(ConfigError, match="group"):
            orthonormal(groups)


@pytest.mark.parametrize(("shape", "carried"), [((3, 3, 6, 6), 3), ((5, 5), 2), ((2, 3, 4, 4), 2)])
def test_carrying_kernels_are_orthonormal_and_pass_a_share_on(shape, carried):
    kernel = np.asarray(carrying(0.5)(jax.random.key(0), shape))
    matrix = kernel.reshape(-1, shape[-1])
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(shape[-1]), atol=1e-6)
    identity = np.zeros((*shape[:-1], carried))
    center = tuple((size - 1) // 2 for size in shape[:-2])
    identity[center][:carried] = np.eye(carried)
    np.testing.assert_array_equal(kernel[..., :carried], identity)


def test_all_or_nothing_may_carry():
    shape, key = (3, 3, 4, 4), jax.random.key(0)
    center = carrying(1.0)(key, shape)[1, 1]
    np.testing.assert_array_equal(center, np.eye(4))
    none = carrying(0.0)(key, shape).reshape(36, 4)
    np.testing.assert_allclose(none.T @ none, np.eye(4), atol=1e-6)


def test_what_cannot_carry():
    with pytest.raises(ConfigError, match="share=1.5"):
        carrying(1.5)
    with pytest.raises(ConfigError, match=r"\(3, 3, 4, 8\).*4 inputs and 8 outputs"):
        carrying()(jax.random.key(0), (3, 3, 4, 8))
