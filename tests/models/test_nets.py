"""Structure of the nets, and equality of their scanned and unrolled forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from orthojax.benchmarks.cost import all_reduces
from orthojax.models import PlainNet, ResNet, in_order, stack_blocks, unstack_blocks
from orthojax.models.convolution import conv_general_dilated
from orthojax.sites import SITE
from orthojax.sites.modulation import modulation
from orthojax.training.state import init_state
from orthojax.training.step import make_train_step
from tests.models.small_nets import (
    SmallPlainNet,
    SmallResNet,
    assert_same,
    compiled_pass,
    filled_variables,
    value_and_gradients,
)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (4, 8, 8, 3))


def init(net, images):
    return net.init(jax.random.key(0), images, train=False)


def kernel_count(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    kernels = [leaf for path, leaf in leaves if path[-1].key == "kernel"]
    return sum(kernel.shape[0] if kernel.ndim == 5 else 1 for kernel in kernels)


@pytest.mark.parametrize("depth", [8, 14, 20, 110, 1004])
def test_depth_counts_the_parametric_layers(depth, images):
    net = PlainNet(depth=depth, width=4)
    variables = jax.eval_shape(lambda: init(net, images))
    assert kernel_count(variables["params"]) == depth


def test_resnet_has_two_projection_shortcuts_more(images):
    variables = jax.eval_shape(lambda: init(ResNet(depth=20, width=4), images))
    assert kernel_count(variables["params"]) == 20 + 2
    shortcut = variables["params"]["stage_2"]["entry"]["shortcut"]["conv"]["kernel"]
    assert shortcut.shape == (3, 3, 4, 8)


def test_published_parameter_counts(images):
    """He et al. (2016), table 6: 0.27 M for 20 layers, 0.66 M for 44, 1.7 M for 110."""
    for depth, millions in ((20, 0.27), (44, 0.66), (110, 1.7)):
        shapes = jax.eval_shape(lambda d=depth: init(PlainNet(depth=d), images))
        count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes["params"]))
        assert round(count / 1e6, 1 if depth == 110 else 2) == millions


@pytest.mark.parametrize("kind", [SmallPlainNet, SmallResNet])
def test_scanned_and_unrolled_nets_are_one_function(kind, images):
    net = kind(modulated=True)
    variables = filled_variables(net, images)
    actual = compiled_pass(net, variables, images)
    expected = compiled_pass(net.clone(scan=False), unstack_blocks(variables), images)
    assert_same(tuple(map(unstack_blocks, actual)), expected)
    assert_same(compiled_pass(net.clone(unroll=2), variables, images), actual)


@pytest.mark.parametrize(("kind", "depth"), [(SmallPlainNet, 4), (SmallResNet, 5)])
def test_recomputing_segments_changes_nothing(kind, depth, images):
    """Whole segments of two, with and without a rest."""
    net = kind(depth=depth, modulated=True)
    segmented = net.clone(remat="segments")
    variables = filled_variables(net, images)
    expected = compiled_pass(net, variables, images)
    assert_same(compiled_pass(segmented, variables, images), expected, rtol=1e-5, atol=1e-5)
    initial = [jax.eval_shape(lambda n=n: init(n, images)) for n in (net, segmented)]
    assert initial[0] == initial[1]
    infer = jax.jit(lambda net: net.apply(variables, images, train=False), static_argnums=0)
    np.testing.assert_allclose(infer(net), infer(segmented), rtol=1e-5, atol=1e-5)


def test_segments_need_less_memory_than_blocks():
    images = jnp.zeros((64, 8, 8, 1))
    net = SmallPlainNet(depth=60)
    variables = filled_variables(net, images)
    held = {}
    for remat in ("none", "blocks", "segments"):
        compiled = compiled_pass.lower(net.clone(remat=remat), variables, images).compile()
        held[remat] = compiled.memory_analysis().temp_size_in_bytes
    assert held["segments"] < held["blocks"] < held["none"] / 2


def test_unknown_recomputation_is_refused():
    with pytest.raises(ValueError, match="remat=True must be one of 'none', 'blocks', 'segments'"):
        PlainNet(depth=8, remat=True)
    with pytest.raises(ValueError, match="segments are of scanned blocks"):
        PlainNet(depth=8, remat="segments", scan=False)
    with pytest.raises(ValueError, match="unroll=2 changes nothing with scan=False"):
        PlainNet(depth=8, unroll=2, scan=False)


def test_stacking_is_the_inverse_of_unstacking(images):
    net = SmallPlainNet(modulated=True)
    variables = filled_variables(net, images)
    unstacked = unstack_blocks(variables)
    assert "scanned" not in str(jax.tree.structure(unstacked))
    again = stack_blocks(unstacked)
    assert jax.tree.structure(again) == jax.tree.structure(dict(variables))
    jax.tree.map(np.testing.assert_array_equal, again, dict(variables))
    shapes = jax.eval_shape(lambda: init(net.clone(scan=False), images))
    assert jax.tree.structure(unstacked) == jax.tree.structure(dict(shapes))


@pytest.mark.parametrize("name", ["orthonormal", "delta_orthonormal"])
def test_every_kernel_starts_orthonormal(name, images):
    net = SmallPlainNet(kernel_init=name, bn_bias=1.5, num_classes=5)
    variables = unstack_blocks(jax.jit(lambda: init(net, images))())
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        if path[-1].key == "kernel":
            matrix = np.asarray(leaf, np.float64).reshape(-1, leaf.shape[-1])
            gram = matrix.T @ matrix
            np.testing.assert_allclose(gram, np.eye(len(gram)), atol=1e-5)
    block = variables["params"]["stage_1"]["block_1"]["layer_1"]
    np.testing.assert_array_equal(block["bn"]["bias"], np.full(4, 1.5))
    center = np.array(block["conv"]["kernel"])
    center[1, 1] = 0
    assert np.any(center) == (name == "orthonormal")


@pytest.mark.parametrize("scan", [True, False])
def test_every_convolution_has_a_site_and_positions_go_upwards(scan, images):
    net = PlainNet(depth=20, width=4, modulated=True, scan=scan)

    @jax.jit  # the kernels that go nowhere are not computed
    def sites():
        return [leaf for path, leaf in in_order(init(net, images)["params"]) if path.endswith(SITE)]

    positions = [float(site[2]) for site in sites()]
    assert len(positions) == 19
    blocks = positions[1:]  # the layers of a scanned stage take turns, so only stages compare
    assert positions[0] == 0 and min(blocks[:6]) > 0
    assert max(blocks[:6]) < min(blocks[6:12]) and max(blocks[6:12]) < min(blocks[12:])
    assert scan or positions == sorted(positions)


def test_bfloat16_keeps_parameters_and_statistics_in_float32(images):
    net = PlainNet(depth=8, width=4, dtype=jnp.bfloat16, modulated=True)
    variables = jax.eval_shape(lambda: init(net, images))
    found = jax.eval_shape(lambda v: value_and_gradients(net, v, images), variables)
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, found))} == {jnp.dtype("float32")}


def test_bad_depth_and_initializer_are_named():
    with pytest.raises(ValueError, match=r"depth=45 is not 6n \+ 2.*44 and 50"):
        PlainNet(depth=45)
    with pytest.raises(ValueError, match="'orthonormall' is unknown"):
        PlainNet(kernel_init="orthonormall")


@pytest.mark.parametrize(
    ("size", "channels", "features", "window"),
    [
        ((9, 6), 3, 5, (3, 3)),
        ((2, 2), 4, 4, (3, 3)),
        ((8, 8), 2, 3, (5, 1)),
        ((4, 4), 3, 2, (1, 1)),
    ],
)
def test_cpu_convolution_and_its_gradient_equal_xlas(size, channels, features, window):
    x = jax.random.normal(jax.random.key(0), (3, *size, channels))
    kernel = jax.random.normal(jax.random.key(1), (*window, channels, features))
    arguments = dict(
        window_strides=(1, 1), padding="SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

    def both(convolve):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(convolve(x, kernel, **arguments)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, kernel)

    ours = str(jax.make_jaxpr(lambda: conv_general_dilated(x, kernel, **arguments))())
    assert "custom_vjp_call" in ours  # really the other formulation
    for a, b in zip(
        jax.tree.leaves(both(conv_general_dilated)),
        jax.tree.leaves(both(lax.conv_general_dilated)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_strided_and_grouped_convolutions_are_left_to_xla():
    x, kernel = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 4, 4))
    for options in (
        dict(window_strides=(2, 2), padding="SAME"),
        dict(window_strides=(1, 1), padding="VALID"),
        dict(window_strides=(1, 1), padding="SAME", rhs_dilation=(2, 2)),
    ):
        arguments = dict(options, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        np.testing.assert_array_equal(
            conv_general_dilated(x, kernel, **arguments),
            lax.conv_general_dilated(x, kernel, **arguments),
        )


def test_modulation_adds_no_all_reduce_to_a_training_step():
    """Of a scanned stage, whose loops run more than once, and of layers outside of it."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    batch = {
        "image": jax.ShapeDtypeStruct((16, 8, 8, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((16,), jnp.int32),
    }

    def count(modulated):
        net = SmallPlainNet(modulated=modulated)
        optimizer = modulation(optax.sgd(0.1)) if modulated else optax.sgd(0.1)
        state = jax.eval_shape(lambda: init_state(net, optimizer, (8, 8, 3), 0))
        step = make_train_step(net, optimizer, lambda x, key: x.astype(jnp.float32), 0)
        compiled = jax.jit(step, in_shardings=(whole, split), out_shardings=(whole, whole))
        return all_reduces(compiled.lower(state, batch).compile())

    plain = count(False)
    assert plain > 0
    assert count(True) == plain


def test_evaluation_can_be_differentiated_forwards(images):
    net = SmallPlainNet(modulated=True)
    variables = filled_variables(net, images)

    @jax.jit
    def products(images, tangent, weight):
        def logits(images):
            return net.apply(variables, images, train=False)

        forward = jax.jvp(logits, (images,), (tangent,))[1]
        backward = jax.vjp(logits, images)[1](weight)[0]
        return jnp.vdot(weight, forward), jnp.vdot(backward, tangent)

    normal = np.random.default_rng(2).standard_normal
    found = products(images, normal(images.shape), normal((len(images), 10)))
    np.testing.assert_allclose(*found, rtol=1e-3)


def test_a_training_pass_under_shard_map_with_its_default_checks(images):
    """Each device has its own statistics, so the gradient is that of groups of the batch."""
    net = SmallPlainNet(modulated=True)
    variables = filled_variables(net, images)

    def gradient(net, params, images):
        return value_and_gradients(net, {**variables, "params": params}, images)[0]

    mapped = jax.shard_map(
        functools.partial(gradient, net),
        mesh=jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(PartitionSpec(), PartitionSpec("data")),
        out_specs=PartitionSpec(),
    )
    actual = jax.jit(mapped)(variables["params"], images)
    expected = jax.jit(gradient, static_argnums=0)(
        net.clone(bn_groups=2), variables["params"], images
    )
    actual = jax.tree_util.tree_map_with_path(  # sums over devices, and means over groups
        lambda path, leaf: leaf / 2 if path[-1].key == SITE else leaf, actual
    )
    assert_same(actual, expected)


@pytest.mark.parametrize("train", [False, True])
def test_nothing_relies_on_rank_promotion(train, images):
    net = PlainNet(depth=8, width=4, modulated=True)
    variables = filled_variables(net, images)
    with jax.numpy_rank_promotion("raise"):
        if train:
            jax.eval_shape(lambda: value_and_gradients(net, variables, images))
        else:
            jax.eval_shape(lambda: net.apply(variables, images, train=False))
