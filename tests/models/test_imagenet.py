"""The nets of Table 1 against the table, written out here a second time."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import orthojax
from orthojax.models import (
    ImageNetPlainNet,
    ImageNetResNet,
    PlainNet,
    in_order,
    unstack_blocks,
)
from orthojax.models.blocks import LayerSpec, PlainBlock, ResidualBlock
from orthojax.models.imagenet import BOTTLENECKS
from orthojax.models.stacking import Stage
from orthojax.sites import SITE

IMAGE = (224, 224, 3)
KINDS = [ImageNetPlainNet, ImageNetResNet]
DEPTHS = [34, 101]

# The cells of Table 1: (window, channels) of a block's convolutions, blocks, output size.
TABLE_1 = {
    34: [
        ([(3, 64), (3, 64)], 3, 56),
        ([(3, 128), (3, 128)], 4, 28),
        ([(3, 256), (3, 256)], 6, 14),
        ([(3, 512), (3, 512)], 3, 7),
    ],
    101: [
        ([(1, 64), (1, 64), (3, 256)], 3, 56),
        ([(1, 128), (1, 128), (3, 512)], 4, 28),
        ([(1, 256), (1, 256), (3, 1024)], 23, 14),
        ([(1, 512), (1, 512), (3, 2048)], 3, 7),
    ],
}


def table_1(depth, residual):
    """(window, channels in, channels out, stride, output size) of every convolution, in order."""
    convolutions = [(7, 3, 64, 2, 112)]
    channels, size = 64, 56  # after max pooling
    for cell, blocks, output_size in TABLE_1[depth]:
        for _ in range(blocks):
            block_in, block_stride = channels, size // output_size
            for index, (window, features) in enumerate(cell):
                stride = block_stride if index == 0 else 1
                convolutions.append((window, channels, features, stride, output_size))
                channels = features
            if residual and (block_in, block_stride) != (channels, 1):
                convolutions.append((3, block_in, channels, block_stride, output_size))
            size = output_size
    return [*convolutions, (3, channels, 1024, 1, 7)]


def shapes_of(net, image=IMAGE):
    images = jax.ShapeDtypeStruct((2, *image), jnp.float32)
    return dict(jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), images))


def kernels_of(params):
    """path -> shape of one layer, stacked layers one by one."""
    kernels = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("kernel"):
            stacked = "scanned" in name
            for index in range(leaf.shape[0] if stacked else 1):
                kernels[f"{name}[{index}]"] = leaf.shape[1:] if stacked else leaf.shape
    return kernels


def parameter_count(params):
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_convolution_is_that_of_table_1(depth, kind):
    called = []

    def record(call, args, kwargs, context):
        result, module = call(*args, **kwargs), context.module
        if isinstance(module, nn.Conv) and context.method_name == "__call__":
            window, _, channels, features = module.variables["params"]["kernel"].shape
            assert not module.use_bias
            assert result.shape[1] == result.shape[2]
            called.append((window, channels, features, module.strides, result.shape[1]))
        return result

    with nn.intercept_methods(record):
        params = shapes_of(kind(depth=depth, scan=False))["params"]
    assert called == table_1(depth, kind is ImageNetResNet)
    assert params["head"]["kernel"].shape == (1024, 1000)


@pytest.mark.parametrize("depth", DEPTHS)
def test_output_sizes_are_those_of_table_1(depth):
    stages = orthojax.describe_net(ImageNetPlainNet(depth=depth), IMAGE).stages
    names = ["stem", "pool", "stage_1", "stage_2", "stage_3", "stage_4", "last", "head"]
    assert [stage.name for stage in stages] == names
    assert [stage.output[:2] for stage in stages[:-1]] == [
        (size, size) for size in (112, 56, 56, 28, 14, 7, 7)
    ]
    assert stages[-1].output == (1000,)


@pytest.mark.parametrize("depth", [34, 50, 101, 152])
def test_depth_is_the_count_of_he_et_al_and_table_1_adds_one_layer(depth):
    plain = kernels_of(shapes_of(ImageNetPlainNet(depth=depth))["params"])
    assert len(plain) == depth + 1
    assert [name for name in plain if name.startswith("last/")] == ["last/conv/kernel[0]"]
    residual = kernels_of(shapes_of(ImageNetResNet(depth=depth))["params"])
    shortcuts = [name for name in residual if "shortcut" in name]
    assert len(shortcuts) == (3 if depth == 34 else 4)  # where 64 channels become 64, or 256
    assert len(residual) == depth + 1 + len(shortcuts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_no_kernel_has_more_outputs_than_inputs(depth, kind):
    for name, shape in kernels_of(shapes_of(kind(depth=depth))["params"]).items():
        assert math.prod(shape[:-1]) >= shape[-1], name


def test_parameter_counts():
    """Kernels by their squares of channels; two BN parameters per channel of a convolution."""
    c = 64
    stem, head = 7 * 7 * 3 * c + 2 * c, 1024 * 1000 + 1000
    basic = 9 * c**2 * (6 + (2 + 7 * 4) + (8 + 11 * 16) + (32 + 5 * 64))
    basic_bn = 2 * c * (6 + 8 * 2 + 12 * 4 + 6 * 8)
    last = 9 * 512 * 1024 + 2 * 1024
    assert stem + basic + basic_bn + last + head == 26_856_488
    shortcuts = 9 * c**2 * (2 + 8 + 32) + 2 * c * (2 + 4 + 8)

    # A bottleneck at c channels: 1×1 from 4c (or what comes in), 1×1, 3×3.
    def bottlenecks(c, entering, blocks):
        kernels = entering * c + (blocks - 1) * 4 * c * c + blocks * (c * c + 9 * c * 4 * c)
        return kernels + blocks * 2 * (c + c + 4 * c)

    deep = sum(
        bottlenecks(*sizes)
        for sizes in ((64, 64, 3), (128, 256, 4), (256, 512, 23), (512, 1024, 3))
    )
    deep_last = 9 * 2048 * 1024 + 2 * 1024
    deep_shortcuts = 9 * (64 * 256 + 256 * 512 + 512 * 1024 + 1024 * 2048)
    deep_shortcuts += 2 * (256 + 512 + 1024 + 2048)
    expected = {
        (ImageNetPlainNet, 34): stem + basic + basic_bn + last + head,
        (ImageNetResNet, 34): stem + basic + basic_bn + shortcuts + last + head,
        (ImageNetPlainNet, 101): stem + deep + deep_last + head,
        (ImageNetResNet, 101): stem + deep + deep_shortcuts + deep_last + head,
    }
    for (kind, depth), count in expected.items():
        net = kind(depth=depth)
        assert parameter_count(shapes_of(net)["params"]) == count
        assert orthojax.describe_net(net, IMAGE).total.parameters == count


@pytest.mark.parametrize(
    ("depth", "parameters", "multiply_adds"),
    [(34, 21_797_672, 3.6e9), (50, 25_557_032, 3.8e9), (101, 44_549_160, 7.6e9),
     (152, 60_192_808, 11.3e9)],
)  # fmt: skip
def test_published_residual_nets(depth, parameters, multiply_adds):
    """Less what Table 1 adds, these are He et al.'s nets.

    Parameters: torchvision's `resnet34` to `resnet152`. Multiply-adds: He et al. (2016), table 1.
    """
    net = ImageNetResNet(depth=depth, bottleneck="paper" if depth == 34 else "standard")
    total = orthojax.describe_net(net, IMAGE).total
    channels = 512 if depth == 34 else 2048
    more_parameters = 9 * channels * 1024 + 2 * 1024 + (1024 - channels) * 1000
    more_operations = 49 * 9 * channels * 1024 + (1024 - channels) * 1000
    if depth == 34:  # a projection is 3×3 here and 1×1 there
        pairs = ((64, 128, 28), (128, 256, 14), (256, 512, 7))
        more_parameters += sum(8 * below * above for below, above, _ in pairs)
        more_operations += sum(8 * below * above * size**2 for below, above, size in pairs)
    assert total.parameters - more_parameters == parameters
    assert total.multiply_adds - more_operations == pytest.approx(multiply_adds, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_multiply_adds_by_the_table(depth, kind):
    convolutions = table_1(depth, kind is ImageNetResNet)
    expected = 1024 * 1000 + sum(w**2 * i * o * size**2 for w, i, o, _, size in convolutions)
    summary = orthojax.describe_net(kind(depth=depth), IMAGE)
    assert summary.total.multiply_adds == expected
    assert summary.total.layers == len(convolutions) + 1
    assert summary.flops == 2 * expected


def test_multiply_adds_by_xla():
    """XLA leaves out products with padding, and counts BN, ReLU and pooling."""

    def taps(size, window, stride):
        """Pairs of an output position and a tap that lies on the image, along one axis."""
        low = max((size - 1) * stride + window - size * stride, 0) // 2
        places = [o * stride - low + tap for o in range(size) for tap in range(window)]
        return sum(0 <= place < size * stride for place in places)

    expected = 1024 * 1000 + sum(
        taps(size, w, stride) ** 2 * i * o for w, i, o, stride, size in table_1(34, False)
    )
    net = ImageNetPlainNet(depth=34, scan=False)
    images = jax.ShapeDtypeStruct((1, *IMAGE), jnp.float32)
    forward = jax.jit(lambda variables, x: net.apply(variables, x, train=False))
    flops = forward.lower(shapes_of(net), images).cost_analysis()["flops"]
    assert 1 < flops / (2 * expected) < 1.01


def test_summary_does_not_depend_on_the_form_of_the_net():
    expected = str(orthojax.describe_net(ImageNetResNet(depth=50), IMAGE))
    for form in (dict(scan=False), dict(remat="blocks"), dict(dtype=jnp.bfloat16)):
        assert str(orthojax.describe_net(ImageNetResNet(depth=50, **form), IMAGE)) == expected
    assert expected.splitlines()[-2].split()[0] == "total"
    lines = str(orthojax.describe_net(PlainNet(depth=110), (32, 32, 3))).splitlines()
    assert lines[-2].split()[:3] == ["total", "10", "110"]


def variables_of(module, *arguments):
    """Kernels with columns of norm 1 or so, biases of 1, the rest as it starts; no compilation."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments, train=False))
    generator = np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key == "kernel":
            rows = math.prod(leaf.shape[-4:-1])
            kernel = generator.standard_normal(leaf.shape, np.float32) / rows**0.5
            return jnp.asarray(kernel, leaf.dtype)
        start = 1.0 if path[-1].key in ("scale", "var", "bias") else 0.0
        return jnp.full(leaf.shape, start, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, dict(shapes))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(module, variables, *arguments):
    """One training pass: gradients, and outputs with new statistics."""

    def loss(params):
        outputs, updated = module.apply(
            {**variables, "params": params}, *arguments, train=True, mutable=["batch_stats"]
        )
        total = sum(jnp.sum(jnp.sin(output)) for output in jax.tree.leaves(outputs))
        return total, {"outputs": outputs, **updated}

    return jax.grad(loss, has_aux=True)(variables["params"])


def assert_same(ours, theirs):
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4 * float(jnp.abs(b).max()))


def test_scanned_and_unrolled_nets_are_one_function_and_every_site_measures():
    scanned = ImageNetPlainNet(width=4, num_classes=5, modulated=True)
    images = jax.random.normal(jax.random.key(1), (4, 64, 64, 3))
    variables = variables_of(scanned, images)
    gradients, others = value_and_gradients(scanned, variables, images)
    measured = [leaf for path, leaf in in_order(gradients) if path.endswith(SITE)]
    assert [float(site[1]) for site in measured] == [1] * 34  # stem, 32 in blocks, last: no head
    assert all(0 < float(site[0]) < jnp.inf for site in measured)
    unrolled = scanned.clone(scan=False)
    expected = value_and_gradients(unrolled, unstack_blocks(variables), images)
    assert_same((unstack_blocks(gradients), unstack_blocks(others)), expected)


@pytest.mark.parametrize(
    ("block", "bottleneck"), [(PlainBlock, "paper"), (ResidualBlock, "standard")]
)
def test_a_stage_of_bottlenecks_is_one_function_in_all_its_forms(block, bottleneck):
    init = nn.initializers.he_normal()
    scanned = Stage(
        block,
        blocks=3,
        features=4,
        stride=2,
        spec=LayerSpec(init, init, modulated=True),
        layout=BOTTLENECKS[bottleneck],
        scan=True,
        remat="none",
    )
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 8))
    variables = variables_of(scanned, images)
    gradients, others = value_and_gradients(scanned, variables, images)
    assert others["outputs"].shape == (4, 8, 8, 16)
    unrolled = scanned.clone(scan=False)
    expected = value_and_gradients(unrolled, unstack_blocks(variables), images)
    assert_same((unstack_blocks(gradients), unstack_blocks(others)), expected)
    again = value_and_gradients(scanned.clone(remat="blocks"), variables, images)
    assert_same((gradients, others), again)


def test_standard_bottlenecks_are_orthonormal_in_groups():
    params = shapes_of(ImageNetResNet(depth=50, bottleneck="standard"))["params"]
    wide = {row.path: row for row in orthojax.describe(params).rows if len(row.groups) > 1}
    # The last of each block, and projections: 64 to 256 channels at first, then 256 to 512, ...
    assert set(wide) == {
        f"stage_{stage}/{name}/conv/kernel"
        for stage in (1, 2, 3, 4)
        for name in ("entry/layer_2", "scanned/layer_2", "entry/shortcut")
    }
    assert wide["stage_1/entry/shortcut/conv/kernel"].groups == (64, 64, 64, 64)
    assert wide["stage_3/entry/shortcut/conv/kernel"].groups == (512, 512)
    assert wide["stage_2/scanned/layer_2/conv/kernel"].groups == (128, 128, 128, 128)
    assert wide["stage_2/scanned/layer_2/conv/kernel"].blocks == 3

    spec = LayerSpec(orthojax.orthonormal(), orthojax.orthonormal())
    block = ResidualBlock(4, spec, layout=BOTTLENECKS["standard"])
    images = jnp.zeros((1, 2, 2, 4))
    params = jax.jit(lambda: block.init(jax.random.key(0), images, train=False))()["params"]
    in_groups = orthojax.orthonormality_error(params)
    assert len(in_groups) == 4 and max(map(float, in_groups.values())) < 1e-5
    in_one = orthojax.orthonormality_error(params, grouping="none")
    assert {path.split("/")[0] for path, error in in_one.items() if float(error) > 1e-5} == {
        "layer_2",
        "shortcut",
    }


def test_what_does_not_exist_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="depth=35 is unknown; take one of 34, 50, 101, 152"):
        ImageNetPlainNet(depth=35)
    with pytest.raises(ValueError, match="'wide' is unknown; take one of 'paper', 'standard'"):
        ImageNetResNet(depth=101, bottleneck="wide")
    with pytest.raises(ValueError, match="depth=34 has no bottlenecks"):
        ImageNetPlainNet(depth=34, bottleneck="standard")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_training_pass_at_full_size(depth, kind):
    net = kind(depth=depth, modulated=True, bn_bias=1.0)
    images = jax.random.normal(jax.random.key(1), (2, *IMAGE))
    gradients, others = value_and_gradients(net, variables_of(net, images), images)
    assert others["outputs"].shape == (2, 1000)
    for leaf in jax.tree.leaves((gradients, others)):
        assert bool(jnp.all(jnp.isfinite(leaf)))
    for name, leaf in gradients.items():
        assert any(bool(jnp.any(part != 0)) for part in jax.tree.leaves(leaf)), name
