"""The nets of Table 1 against the table, written out here a second time."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import orthojax
from orthojax.models import (
    ImageNetPlainNet,
    ImageNetResNet,
    PlainNet,
    unstack_blocks,
)
from orthojax.models.blocks import LayerSpec, ResidualBlock
from orthojax.models.imagenet import BOTTLENECKS
from orthojax.models.stacking import Stage
from orthojax.sites import SITE
from tests.models.small_nets import assert_same, compiled_pass, filled_variables

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


def shapes_by_layer(params, name="kernel"):
    """path -> shape of one layer, stacked layers one by one."""
    shapes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        place = jax.tree_util.keystr(path, simple=True, separator="/")
        if path[-1].key == name:
            stacked = "scanned" in place
            for index in range(leaf.shape[0] if stacked else 1):
                shapes[f"{place}[{index}]"] = leaf.shape[1:] if stacked else leaf.shape
    return shapes


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
    plain = shapes_by_layer(shapes_of(ImageNetPlainNet(depth=depth))["params"])
    assert len(plain) == depth + 1
    assert [name for name in plain if name.startswith("last/")] == ["last/conv/kernel[0]"]
    residual = shapes_by_layer(shapes_of(ImageNetResNet(depth=depth))["params"])
    shortcuts = [name for name in residual if "shortcut" in name]
    assert len(shortcuts) == (3 if depth == 34 else 4)  # where 64 channels become 64, or 256
    assert len(residual) == depth + 1 + len(shortcuts)


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
def test_counts_by_the_table(depth, kind):
    convolutions = table_1(depth, kind is ImageNetResNet)
    expected = 1024 * 1000 + sum(w**2 * i * o * size**2 for w, i, o, _, size in convolutions)
    parameters = 1025 * 1000 + sum(w**2 * i * o + 2 * o for w, i, o, _, _ in convolutions)
    summary = orthojax.describe_net(kind(depth=depth), IMAGE)
    assert summary.total.multiply_adds == expected
    assert summary.total.parameters == parameters
    assert summary.total.layers == len(convolutions) + 1
    assert summary.flops == 2 * expected


def test_summary_does_not_depend_on_the_form_of_the_net():
    expected = str(orthojax.describe_net(ImageNetResNet(depth=50), IMAGE))
    for form in (dict(scan=False), dict(remat="blocks"), dict(dtype=jnp.bfloat16)):
        assert str(orthojax.describe_net(ImageNetResNet(depth=50, **form), IMAGE)) == expected
    assert expected.splitlines()[-2].split()[0] == "total"
    lines = str(orthojax.describe_net(PlainNet(depth=110), (32, 32, 3))).splitlines()
    assert lines[-2].split()[:3] == ["total", "10", "110"]


def test_every_convolution_has_a_site():
    params = shapes_of(ImageNetPlainNet(depth=34, modulated=True))["params"]
    assert len(shapes_by_layer(params, SITE)) == 34  # stem, 32 in blocks, last: no head


def test_a_stage_of_bottlenecks_is_one_function_in_all_its_forms():
    init = nn.initializers.he_normal()
    scanned = Stage(
        ResidualBlock,
        blocks=3,
        features=4,
        stride=2,
        spec=LayerSpec(init, init, modulated=True),
        layout=BOTTLENECKS["standard"],
        scan=True,
        unroll=1,
        remat="none",
    )
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 8))
    variables = filled_variables(scanned, images)
    found = compiled_pass(scanned, variables, images)
    assert found[1]["outputs"].shape == (4, 4, 4, 16)
    expected = compiled_pass(scanned.clone(scan=False), unstack_blocks(variables), images)
    assert_same(tuple(map(unstack_blocks, found)), expected)
    assert_same(compiled_pass(scanned.clone(remat="blocks"), variables, images), found)


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
    with pytest.raises(ValueError, match="depth=35 must be one of 34, 50, 101, 152"):
        ImageNetPlainNet(depth=35)
    with pytest.raises(ValueError, match="bottleneck='wide' must be one of 'paper', 'standard'"):
        ImageNetResNet(depth=101, bottleneck="wide")
    with pytest.raises(ValueError, match="depth=34 has no bottlenecks"):
        ImageNetPlainNet(depth=34, bottleneck="standard")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_a_training_pass_at_full_size(depth, kind):
    net = kind(depth=depth, modulated=True, bn_bias=1.0)
    images = jax.random.normal(jax.random.key(1), (2, *IMAGE))
    gradients, others = compiled_pass(net, filled_variables(net, images), images)
    assert others["outputs"].shape == (2, 1000)
    for leaf in jax.tree.leaves((gradients, others)):
        assert bool(jnp.all(jnp.isfinite(leaf)))
    for name, leaf in gradients.items():
        assert any(bool(jnp.any(part != 0)) for part in jax.tree.leaves(leaf)), name
