"""Kernels to blocks and back, groups, and Gram products, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orthojax.errors import ConfigError
from orthojax.matrices import (
    KernelAxes,
    accumulation_dtype,
    default_axes,
    from_blocks,
    gram,
    group_sizes,
    times,
    to_blocks,
    valid_columns,
)

CASES = {
    "dense": ((7, 5), default_axes(2), "ceil"),
    "wide dense, literal": ((5, 17), default_axes(2), "literal"),
    "one row": ((1, 4), default_axes(2), "ceil"),
    "first layer": ((3, 3, 3, 64), default_axes(4), "ceil"),
    "stacked conv": ((5, 3, 3, 4, 6), default_axes(5, stacked=1), "ceil"),
    "stacked wide conv": ((2, 1, 1, 4, 6), default_axes(5, stacked=1), "ceil"),
    "doubly stacked dense": ((2, 3, 4, 6), default_axes(4, stacked=2), "none"),
    "depthwise": ((3, 3, 1, 8), KernelAxes((0, 1, 2), (3,), feature_groups=8), "ceil"),
    "grouped, wide": ((1, 1, 3, 8), KernelAxes((0, 1, 2), (3,), feature_groups=2), "ceil"),
    "OIHW": ((6, 4, 3, 3), KernelAxes((2, 3, 1), (0,)), "ceil"),
    "two outputs": ((8, 2, 3), KernelAxes((0,), (1, 2)), "ceil"),
    "stack in the middle, negative axes": ((4, 3, 6), KernelAxes((-3,), (-1,)), "ceil"),
}


def blocks_by_hand(kernel, axes, grouping):
    """The definition: for every stacked layer, feature group and column group, its columns."""
    axes = axes.normalized(kernel.ndim)
    stack = axes.stack(kernel.ndim)
    fan_in, fan_out = axes.matrix_shape(kernel.shape)
    for index in np.ndindex(*(kernel.shape[a] for a in stack)):
        layer = np.moveaxis(kernel, stack, range(len(stack)))[index]
        left = [a for a in range(kernel.ndim) if a not in stack]
        layer = layer.transpose([left.index(a) for a in axes.inputs + axes.outputs])
        matrix = layer.reshape(fan_in, -1)
        for feature_group in np.split(matrix, axes.feature_groups, axis=1):
            ends = np.cumsum(group_sizes(fan_in, fan_out, grouping))[:-1]
            yield from np.split(feature_group, ends, axis=1)


@pytest.mark.parametrize("name", CASES)
def test_blocks_are_the_matrices_of_the_definition(name):
    shape, axes, grouping = CASES[name]
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    blocks = jax.jit(lambda k: to_blocks(k, axes, grouping))(kernel)
    valid = np.asarray(valid_columns(shape, axes, grouping))
    expected = list(blocks_by_hand(kernel, axes, grouping))
    assert len(blocks) == len(valid) == len(expected)
    for block, columns, matrix in zip(np.asarray(blocks), valid, expected, strict=True):
        block = block.reshape(-1, block.shape[-1])
        np.testing.assert_array_equal(block[:, columns], matrix)
        assert not block[:, ~columns].any()
    back = jax.jit(from_blocks, static_argnums=(1, 2, 3))(blocks, shape, axes, grouping)
    np.testing.assert_array_equal(back, kernel)


@st.composite
def kernels(draw):
    """A shape, and any split of its axes into stack, inputs and outputs, in any order."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=5)))
    order = draw(st.permutations(range(len(shape))))
    inputs = draw(st.integers(1, len(shape) - 1))
    outputs = draw(st.integers(1, len(shape) - inputs))
    axes = KernelAxes(tuple(order[:inputs]), tuple(order[inputs : inputs + outputs]))
    return shape, axes, draw(st.sampled_from(["ceil", "literal", "none"]))


@settings(max_examples=25, deadline=None)
@given(kernels(), st.integers(0, 2**32 - 1))
def test_any_kernel_goes_to_blocks_and_back(case, seed):
    shape, axes, grouping = case
    kernel = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    blocks = np.asarray(to_blocks(kernel, axes, grouping))
    valid = np.asarray(valid_columns(shape, axes, grouping))
    for block, columns, matrix in zip(
        blocks, valid, blocks_by_hand(kernel, axes, grouping), strict=True
    ):
        np.testing.assert_array_equal(block.reshape(-1, block.shape[-1])[:, columns], matrix)
    np.testing.assert_array_equal(from_blocks(blocks, shape, axes, grouping), kernel)
    # What is counted as a column is one, and padding adds nothing to a Gram product.
    total = np.sum(np.square(kernel, dtype=np.float64))
    np.testing.assert_allclose(np.trace(gram(blocks), axis1=1, axis2=2).sum(), total, rtol=1e-5)


@pytest.mark.parametrize(
    ("fan", "grouping", "sizes"),
    [
        ((27, 64), "ceil", (27, 27, 10)),
        ((27, 64), "literal", (27, 27, *(1,) * 10)),
        ((27, 64), "none", (64,)),
        ((27, 54), "ceil", (27, 27)),
        ((64, 27), "literal", (27,)),
        ((9, 9), "ceil", (9,)),
    ],
)
def test_group_sizes(fan, grouping, sizes):
    assert group_sizes(*fan, grouping) == sizes


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gram_products_are_computed_in_float32(dtype):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 8, 16)), dtype)
    blocks = to_blocks(kernel, default_axes(4))
    matrix = np.asarray(kernel, np.float64).reshape(72, 16)
    assert gram(blocks).dtype == jnp.float32
    np.testing.assert_allclose(gram(blocks)[0], matrix.T @ matrix, atol=1e-4)
    image = times(blocks, gram(blocks))[0].reshape(72, 16)
    np.testing.assert_allclose(image, matrix @ matrix.T @ matrix, atol=2e-3)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        assert accumulation_dtype(jnp.float64) == jnp.float64
    assert accumulation_dtype(np.float64) == jnp.float32  # what JAX makes of it by default


@pytest.mark.parametrize(
    "axes",
    [
        KernelAxes((0, 1), (1,)),
        KernelAxes((0,), (4,)),
        KernelAxes((), (1,)),
        KernelAxes((0,), (1,), spatial=(1,)),
    ],
)
def test_impossible_axes_are_errors(axes):
    with pytest.raises(ConfigError, match="KernelAxes"):
        axes.normalized(3)


def test_impossible_groups_are_errors():
    with pytest.raises(ConfigError, match="feature_groups=3"):
        KernelAxes((0,), (1,), feature_groups=3).matrix_shape((4, 8))
    with pytest.raises(ConfigError, match="ceil"):
        group_sizes(2, 3, "ceiling")
