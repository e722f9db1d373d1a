"""Which axes the ready-made views see, on real modules of Flax, Equinox and on Haiku's layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orthojax.describe import describe
from orthojax.errors import ConfigError
from orthojax.matrices import KernelAxes
from orthojax.ortho import optax_ortho, views

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")


def fans(params, view=None):
    """`{path: (blocks, f_in, f_out)}` of what is penalized."""
    rows = describe(params, view=view).rows
    assert not [row for row in rows if row.reason.startswith("ERROR")], str(describe(params))
    return {row.path: (row.blocks, *row.fan) for row in rows if row.penalized}


def questions(params, view=None):
    """The paths of the parameters that the view asks about."""
    rows = describe(params, view=view).rows
    return {row.path for row in rows if row.reason.startswith("ERROR")}


def shapes(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def init_shapes(model, x):
    return jax.eval_shape(model.init, jax.random.key(0), x)["params"]


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = nn.Conv(4, (3, 3), name="conv")(x)
        return nn.BatchNorm(use_running_average=True, name="norm")(x), None


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), name="stem")(x)
        axes = {"params": 0, "batch_stats": 0}
        stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
        x, _ = stack(name="scanned")(x, None)
        x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        x = nn.Conv(8, (1, 1), feature_group_count=2, name="grouped")(x)
        x = nn.ConvTranspose(4, (2, 2), name="up")(x)
        x = nn.LayerNorm(name="layer_norm")(x).reshape(x.shape[0], -1, 4)
        x = nn.MultiHeadDotProductAttention(2, qkv_features=8, out_features=4, name="attention")(x)
        x = x + nn.Embed(7, 4, name="embed")(jnp.zeros((1,), int))
        return nn.DenseGeneral(3, axis=(1, 2), name="head")(x[:, :4])


def test_flax_linen():
    params = init_shapes(LinenNet(), jnp.ones((2, 4, 4, 1)))
    view = views.flax(feature_groups={"grouped/*": 2})
    assert fans(params, view) == {
        "stem/kernel": (1, 9, 4),
        "scanned/conv/kernel": (3, 36, 4),
        "depthwise/kernel": (4, 9, 1),
        "grouped/kernel": (2, 2, 4),
        "up/kernel": (1, 32, 4),
        "attention/query/kernel": (1, 4, 8),
        "attention/key/kernel": (1, 4, 8),
        "attention/value/kernel": (1, 4, 8),
        "attention/out/kernel": (1, 8, 4),
        "head/kernel": (1, 16, 3),
    }
    optax_ortho(view=view).init(params)


class Layers(nn.Module):
    """Layers one after another, in the form that `nn.scan` wants."""

    layers: tuple

    @nn.compact
    def __call__(self, x, _=None):
        for make in self.layers:
            x = make()(x)
        return x, None


class Layer(nn.Module):
    """One layer, in the form that `nn.remat_scan` wants."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(8)(x)


PER_LAYER = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}


def scan(*layers, name=None, lift=lambda module: module, **axes):
    return nn.scan(lift(Layers), length=5, **(axes or PER_LAYER))(layers, name=name)


def vmap(module, size=5, **axes):
    return nn.vmap(module, in_axes=None, axis_size=size, **(axes or PER_LAYER))


def dense(features=8, **arguments):
    return lambda: nn.Dense(features, **arguments)


def conv(*window):
    return lambda: nn.Conv(8, window, use_bias=False)


def attention(**arguments):
    # Two heads of 3.
    return lambda: nn.MultiHeadDotProductAttention(2, qkv_features=6, out_features=8, **arguments)


SEQUENCE, IMAGE, VOLUME = jnp.ones((2, 6, 8)), jnp.ones((2, 6, 6, 8)), jnp.ones((1, 4, 4, 4, 2))
ATTENTION = {(8, 6), (6, 8)}
# What makes the layer, within a module; its input; blocks; matrices of a block.
LAYERS = {
    "scan": (lambda: scan(dense()), SEQUENCE, 5, {(8, 8)}),
    "scan of remat": (lambda: scan(dense(), lift=nn.remat), SEQUENCE, 5, {(8, 8)}),
    "remat_scan": (lambda: nn.remat_scan(Layer, (2, 3))(), SEQUENCE, 6, {(8, 8)}),
    "vmap": (lambda: vmap(nn.Dense)(4), SEQUENCE, 5, {(8, 4)}),
    "vmap, twice": (lambda: vmap(vmap(nn.Dense, 2), 3)(4), SEQUENCE, 6, {(8, 4)}),
    "vmap, no bias": (lambda: vmap(nn.Dense)(4, use_bias=False), SEQUENCE, 5, {(8, 4)}),
    "vmap, shared": (
        lambda: vmap(nn.Dense, variable_axes={"params": None}, split_rngs={"params": False})(4),
        SEQUENCE,
        1,
        {(8, 4)},
    ),
    "scan, no bias": (lambda: scan(dense(use_bias=False)), SEQUENCE, 5, {(8, 8)}),
    "scan of 1-D convolutions": (lambda: scan(conv(3), nn.LayerNorm), SEQUENCE, 5, {(24, 8)}),
    "scan of 2-D convolutions": (
        lambda: scan(conv(3, 3), nn.LayerNorm, name="layers"),
        IMAGE,
        5,
        {(72, 8)},
    ),
    "scan of attention": (
        lambda: scan(attention(), nn.RMSNorm, name="layers"),
        SEQUENCE,
        5,
        ATTENTION,
    ),
    "attention, no bias": (attention(use_bias=False), SEQUENCE, 1, ATTENTION),
    "scan, shared": (
        lambda: scan(dense(), variable_broadcast="params", split_rngs={"params": False}),
        SEQUENCE,
        1,
        {(8, 8)},
    ),
    "1-D convolution": (lambda: nn.Conv(4, (3,), name="features"), SEQUENCE, 1, {(24, 4)}),
    "1-D convolution, no bias": (conv(3), SEQUENCE, 1, {(24, 8)}),
    "3-D convolution": (lambda: nn.Conv(4, (3, 3, 3)), VOLUME, 1, {(54, 4)}),
    "unshared convolution": (lambda: nn.ConvLocal(4, (3,)), SEQUENCE, 6, {(24, 4)}),
    "two outputs": (lambda: nn.DenseGeneral((2, 3)), SEQUENCE, 1, {(8, 6)}),
    "two inputs": (lambda: nn.DenseGeneral(5, axis=(-2, -1)), SEQUENCE, 1, {(48, 5)}),
    "transposed kernel": (
        lambda: nn.ConvTranspose(5, (3, 3), transpose_kernel=True),
        IMAGE,
        1,
        {(72, 5)},
    ),
}


class Net(nn.Module):
    """Calls the layer within a module, where it gets its default name."""

    make: object

    @nn.compact
    def __call__(self, x):
        return self.make()(x)


@pytest.mark.parametrize("name", LAYERS)
def test_stacks_and_layouts_of_linen(name):
    make, x, blocks, matrices = LAYERS[name]
    params = init_shapes(Net(make), x)
    found = fans(params)
    assert set(found.values()) == {(blocks, *matrix) for matrix in matrices}
    optax_ortho(1e-4).init(params)


# (7, 3, 8, 8) with nothing beside it is read as a 2-D convolution, which it nearly always is.
@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"1-D convolution, no bias"}))
def test_ensembles_are_read_rightly_or_asked_about(name):
    """With one more axis in front of every parameter, as `jax.vmap` of `init` makes it."""
    make, x, blocks, matrices = LAYERS[name]
    params = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct((7, *a.shape), a.dtype), init_shapes(Net(make), x)
    )
    right = {(7 * blocks, *matrix) for matrix in matrices}
    rows = [row for row in describe(params).rows if row.path.endswith("kernel")]
    read = {(row.blocks, *row.fan) for row in rows if row.penalized}
    assert read == right or (not read and questions(params) == {row.path for row in rows})


SILENT = {  # kernels that nothing tells apart: (members, inputs, outputs) or (window, in, out)?
    "experts": {"experts": {"kernel": (5, 8, 4)}},
    "in a net with a norm": {"experts": {"kernel": (5, 8, 4)}, "norm": {"scale": (4,)}},
    "heads": {"q_proj": {"kernel": (8, 2, 4)}},
    "query without out": {"query": {"kernel": (8, 2, 4)}},
    "both ways": {
        "query": {"kernel": (4, 4, 3)},
        "out": {"kernel": (4, 3, 4)},
    },
    "five axes": {"blocks": {"kernel": (5, 3, 3, 4, 6)}},
    "mapped, 2-D or a stack": {"ScanBlock_0": {"conv": {"kernel": (5, 3, 4, 4)}}},
    "the bias fits two ways": {"proj": {"kernel": (4, 4, 3), "bias": (4, 3)}},
    "the bias fits no way": {"proj": {"kernel": (4, 5, 3), "bias": (7,)}},
    "a bias in a stack that is none": {"scanned": {"kernel": (4, 8, 3), "bias": (3,)}},
    "kernels of one axis in a stack": {"scanned": {"kernel": (4, 8)}},
    "Dense_0 in a stack of too many axes": {"scanned": {"Dense_0": {"kernel": (8, 3)}}},
    "vectors of another stack that fit": {
        "stem": {"kernel": (3, 3, 4, 4)},
        "blocks": {"fc": {"kernel": (3, 4, 4), "bias": (3, 4)}},
    },
}


@pytest.mark.parametrize("name", SILENT)
def test_where_only_a_guess_is_left_the_view_asks(name):
    params = shapes(SILENT[name])
    path = min(questions(params))
    with pytest.raises(ConfigError, match=rf"(?s)'{path}' of shape .*overrides=.*stacked=.*mask"):
        optax_ortho(1e-4).init(params)
    # Both ways out.
    axes = KernelAxes(inputs=-2, outputs=-1)
    everywhere = dict.fromkeys(questions(params), axes)
    assert path in fans(params, views.flax(overrides=everywhere))
    others = {"head": {"kernel": jnp.eye(3)}}
    optax_ortho(1e-4, {**dict.fromkeys(params, False), "head": True}).init({**params, **others})


def test_what_tells_a_kernel_without_bias():
    """The same kernel, by what is around it."""
    kernel = (4, 3, 8, 8)
    assert fans(shapes({"a": {"kernel": kernel}})) == {"a/kernel": (1, 96, 8)}
    around = {"a": {"conv": {"kernel": kernel}, "norm": {"scale": (4, 8)}}}
    assert fans(shapes(around)) == {"a/conv/kernel": (4, 24, 8)}
    around = {"a": {"conv": {"kernel": kernel}, "norm": {"scale": (8,)}}}
    assert fans(shapes(around)) == {"a/conv/kernel": (1, 96, 8)}
    around = {"a": {"conv": {"kernel": kernel}}, "scale": (5, 8)}
    assert fans(shapes(around)) == {"a/conv/kernel": (1, 96, 8)}


def test_what_is_no_kernel():
    params = {
        "cls": (1, 1, 4),
        "mask_token": (1, 4),
        "pos_embed": (1, 5, 4),
        "wpe": (16, 4),
        "embed": {"embedding": (9, 4)},
        "scanned": {
            "norm": {"scale": (5, 4), "bias": (5, 4)},
            "gate": {"weights": (5, 4)},
            "dense": {"kernel": (5, 4, 3)},
        },
        "lora": {"lora_a": (8, 2), "lora_b": (2, 8)},
        "attention": {"query": {"kernel": (4, 2, 3), "bias": (2, 3)}},
    }
    assert fans(shapes(params)) == {
        "attention/query/kernel": (1, 4, 6),
        "scanned/dense/kernel": (5, 4, 3),
    }


class Members(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 4, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, 6, decode=False, rngs=rngs, use_bias=False)
        self.norm = nnx.RMSNorm(4, rngs=rngs)
        self.embed = nnx.Embed(3, 4, rngs=rngs)


def test_stacks_of_flax_nnx():
    one = {
        "linear/kernel": (1, 8, 4),
        **{f"attention/{name}/kernel": (1, 4, 6) for name in ("query", "key", "value")},
        "attention/out/kernel": (1, 6, 4),
    }
    model = nnx.eval_shape(lambda: Members(nnx.Rngs(0)))
    assert fans(nnx.state(model, nnx.Param)) == one
    stack = nnx.split_rngs(splits=5)(nnx.vmap(Members))
    stacked = nnx.state(nnx.eval_shape(lambda: stack(nnx.Rngs(0))), nnx.Param)
    assert fans(stacked) == {path: (5, *fan) for path, (_, *fan) in one.items()}


def test_boxed_parameters_of_linen():
    init = nn.with_partitioning(nn.initializers.ones, ("rows", "columns"))
    layer = nn.Dense(4, kernel_init=init)
    params = layer.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    assert fans(params) == {"kernel": (1, 8, 4)}
    ortho = optax_ortho(1.0)
    update, _ = ortho.update(jax.tree.map(jnp.zeros_like, params), ortho.init(params), params)
    plain = nn.unbox(params)
    expected, _ = ortho.update(jax.tree.map(jnp.zeros_like, plain), optax.EmptyState(), plain)
    np.testing.assert_allclose(nn.unbox(update)["kernel"], expected["kernel"])


def test_haiku():
    params = shapes(
        {
            "net/~/conv2_d": {"w": (3, 3, 2, 4), "b": (4,)},
            "net/~/conv3_d": {"w": (3, 3, 3, 2, 4)},
            "net/~/conv1_d": {"w": (3, 2, 4)},
            "net/~/conv2_d_1": {"w": (3, 3, 2, 4), "b": (4, 1, 1)},  # channels first
            "net/~/conv2_d_transpose": {"w": (2, 2, 5, 3), "b": (5,)},
            "net/~/depthwise_conv2_d": {"w": (3, 3, 1, 4)},
            "net/~/batch_norm": {"scale": (1, 1, 1, 4), "offset": (1, 1, 1, 4)},
            "net/~/embed": {"embeddings": (9, 4)},
            "net/__layer_stack_no_per_layer/linear": {"w": (6, 4, 4), "b": (6, 4)},
            "members/linear_1": {"w": (6, 4, 4)},
            "members/own_name": {"w": (6, 4, 3), "b": (6, 3)},
        }
    )
    assert fans(params, views.haiku()) == {
        "net/~/conv2_d/w": (1, 18, 4),
        "net/~/conv3_d/w": (1, 54, 4),
        "net/~/conv1_d/w": (1, 6, 4),
        "net/~/conv2_d_1/w": (1, 18, 4),
        "net/~/conv2_d_transpose/w": (1, 12, 5),
        "net/~/depthwise_conv2_d/w": (4, 9, 1),
        "net/__layer_stack_no_per_layer/linear/w": (6, 4, 4),
        "members/linear_1/w": (6, 4, 4),
        "members/own_name/w": (6, 4, 3),
    }
    assert questions(shapes({"own_name": {"w": (6, 4, 3)}}), views.haiku()) == {"own_name/w"}


def test_equinox():
    eqx = pytest.importorskip("equinox")

    class Plain(eqx.Module):
        weight: jax.Array
        position: jax.Array

    class MyLinear(eqx.nn.Linear):
        pass

    def model(key):
        return {
            "conv": eqx.nn.Conv2d(4, 6, 3, stride=2, groups=2, key=key),
            "depthwise": eqx.nn.Conv1d(4, 4, 3, groups=4, key=key),
            "up": eqx.nn.ConvTranspose2d(4, 6, 3, key=key),
            "mlp": eqx.nn.MLP(4, 3, 8, 1, key=key),
            "mine": MyLinear(3, 2, key=key),
            "cell": eqx.nn.GRUCell(3, 4, key=key),
            "attention": eqx.nn.MultiheadAttention(2, 4, key=key),
            "tokens": eqx.nn.Embedding(9, 4, key=key),
            "stem": eqx.nn.LayerNorm((4, 4)),
            "batch": eqx.nn.GroupNorm(2, 4),
        }

    key = jax.random.key(0)
    params = eqx.filter(eqx.filter_eval_shape(model, key), lambda x: hasattr(x, "shape"))
    one = {
        "conv/weight": (2, 18, 3),
        "depthwise/weight": (4, 3, 1),
        "up/weight": (1, 36, 6),
        "mlp/layers/0/weight": (1, 4, 8),
        "mlp/layers/1/weight": (1, 8, 3),
        "mine/weight": (1, 3, 2),
        "cell/weight_ih": (1, 3, 12),
        "cell/weight_hh": (1, 4, 12),
        "attention/query_proj/weight": (1, 4, 4),
        "attention/key_proj/weight": (1, 4, 4),
        "attention/value_proj/weight": (1, 4, 4),
        "attention/output_proj/weight": (1, 4, 4),
    }
    assert fans(params, views.equinox()) == one
    stacked = eqx.filter_eval_shape(eqx.filter_vmap(model), jax.random.split(key, 5))
    stacked = eqx.filter(stacked, lambda x: hasattr(x, "shape"))
    assert fans(stacked, views.equinox()) == {p: (5 * b, *fan) for p, (b, *fan) in one.items()}

    own = {"own": Plain(jnp.ones((4, 3)), jnp.ones((9, 4))), "head": eqx.nn.Linear(3, 2, key=key)}
    with pytest.raises(ConfigError, match=r"'own/weight' of shape \(4, 3\) is in a Plain.*over"):
        optax_ortho(view=views.equinox()).init(own)
    view = views.equinox(overrides={"own/weight": KernelAxes(inputs=1, outputs=0)})
    assert fans(own, view) == {"own/weight": (1, 3, 4), "head/weight": (1, 3, 2)}


def test_layouts_agree():
    """One convolution in the layouts of Flax and of Equinox gets one and the same gradient."""
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype(np.float32)
    flax = {"kernel": jnp.asarray(kernel)}
    oihw = {"weight": jnp.asarray(kernel.transpose(3, 2, 0, 1))}
    axes = {"weight": KernelAxes(inputs=(2, 3, 1), outputs=0, spatial=(2, 3))}
    ours, _ = optax_ortho(1.0).update(flax, (), flax)
    theirs, _ = optax_ortho(1.0, view=axes).update(oihw, (), oihw)
    np.testing.assert_allclose(
        ours["kernel"], theirs["weight"].transpose(2, 3, 1, 0), rtol=1e-4, atol=1e-4
    )


def test_arguments_of_the_flax_view():
    params = shapes({"net": {"blocks": {"kernel": (5, 3, 3, 4, 6)}}})

    def axes(*stacked, **rules):
        view = views.flax(stacked, **rules) if stacked else views.flax(**rules)
        return view(params)["net/blocks/kernel"]

    assert isinstance(axes(), ConfigError)
    assert axes("blocks").inputs == (1, 2, 3)
    twice = axes("net", "blocks", overrides=None)
    assert isinstance(twice, ConfigError)  # of rank 3 in a stack of 2
    volume = KernelAxes((0, 1, 2, 3), (4,), spatial=(0, 1, 2))
    assert axes(overrides={"net/*": volume}) == volume
    assert axes(overrides={"*/kernel": None}) == "overridden"
    grouped = axes("blocks", feature_groups={"*blocks*": 2})
    assert grouped.spatial == (1, 2) and grouped.feature_groups == 2


@pytest.mark.parametrize("rule", ["overrides", "feature_groups"])
def test_a_pattern_that_matches_nothing_is_a_mistake(rule):
    params = {"attention": {"kernel": jnp.eye(3)}, "mlp": {"kernel": jnp.eye(3)}}
    view = views.flax(
        **{rule: {"attention/kernal": KernelAxes(0, 1) if rule == "overrides" else 1}}
    )
    with pytest.raises(ConfigError, match=f"{rule}.*'attention/kernal'.*'attention/kernel'"):
        optax_ortho(view=view).init(params)
    # What optax masks may be what the pattern is meant for.
    optax.masked(optax_ortho(view=view), {"attention": False, "mlp": True}).init(params)


def test_trees_of_axes_and_functions_to_them():
    """In the manner of `optax.contrib.muon`: `None` skips, the rest of the axes are stacks."""
    params = {"w": jax.random.normal(jax.random.key(0), (2, 4, 3)), "table": jnp.ones((5, 4))}
    tree = {"w": KernelAxes(inputs=1, outputs=2), "table": None}
    expected = {"w": (2, 4, 3)}
    assert fans(params, tree) == expected
    assert fans(params, lambda p: {name: tree[name] for name in p}) == expected
    assert fans(params, lambda p: {"w": "frozen", "table": KernelAxes(0, 1)}) == {
        "table": (1, 5, 4)
    }


def test_what_a_view_must_say():
    params = {"kernel": jnp.ones((3, 3))}
    for view, message in [
        (lambda params: {"kernel": (0, 1)}, "says nothing about parameter 'kernel'"),
        (lambda params: {"kernel": 3}, "'kernel' of shape .3, 3.: the view says 3"),
        ({"kernel": KernelAxes((0,), (2,))}, "'kernel' of shape .3, 3.: .*rank 2"),
        ({"kernel": KernelAxes(0, 1, feature_groups=2)}, "'kernel' .*feature_groups"),
        ("flax", "view='flax' must be a tree.*views.flax"),
        (views.flax, "was not called.*views.flax"),
        (jnp.ones(()), "view=Array.*static_args"),
    ]:
        with pytest.raises(ConfigError, match=f"(?s){message}"):
            optax_ortho(view=view).init(params)


def test_describe():
    params = {
        "stem": {"kernel": jnp.zeros((3, 3, 3, 64)), "bias": jnp.zeros(64)},
        "scanned": {"kernel": jnp.stack([jnp.eye(4), 2 * jnp.eye(4)])},
        "video": {"kernel": jnp.zeros((3, 3, 3, 2, 2))},
        "scale": jnp.ones(()),
    }
    table = describe(params, lambda p: {**dict.fromkeys(p, True), "scale": False})
    rows = {row.path: row for row in table.rows}
    assert rows["stem/kernel"].groups == (27, 27, 10) and rows["stem/kernel"].error == 1.0
    assert rows["scanned/kernel"].blocks == 2 and rows["scanned/kernel"].error == 3.0
    assert not rows["stem/bias"].penalized and rows["scale"].reason == "masked"
    assert rows["video/kernel"].reason.startswith("ERROR")
    text = str(table)
    assert "2×27 + 10" in text and text.endswith("2 of 5 parameters penalized")
    *lines, note, _ = text.splitlines()
    assert max(map(len, lines)) < 100  # the question is a note
    assert note.startswith("note 1: ERROR: parameter 'video/kernel'")
    without_values = describe(jax.eval_shape(lambda: params))
    assert all(row.error is None for row in without_values.rows)


def test_describe_lists_arrays_alone_and_never_fails():
    params = {
        "complex": {"kernel": jnp.ones((2, 2), jnp.complex64)},
        "empty": {"kernel": jnp.ones((0, 2))},
        "key": jax.random.key(0),
        "integers": {"kernel": jnp.ones((2, 2), int)},
        "numpy": {"kernel": np.eye(2)},
        "none": None,
        "masked": optax.MaskedNode(),
        "function": jax.nn.relu,
        "number": 3.0,
        "name": "net",
    }
    rows = {row.path: row for row in describe(params).rows}
    assert set(rows) == {f"{n}/kernel" for n in ("complex", "empty", "integers", "numpy")} | {"key"}
    assert "complex" in rows["complex/kernel"].reason
    assert rows["empty/kernel"].reason == "no elements"
    assert rows["key"].reason.startswith("dtype")
    assert rows["numpy/kernel"].error == 0
    assert str(describe({})).endswith("0 of 0 parameters penalized")


def test_two_parameters_at_one_path_are_refused():
    with pytest.raises(ConfigError, match="'a/kernel'"):
        describe({"a": {"kernel": jnp.eye(2)}, "a/kernel": jnp.eye(3)})
