"""Which axes models and ready-made views tell: Flax and Equinox modules, and Haiku's layouts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orthojax.describe import describe
from orthojax.errors import ConfigError
from orthojax.matrices import KernelAxes, to_blocks
from orthojax.ortho import optax_ortho, views
from orthojax.tree_paths import shapes_by_path

nn = pytest.importorskip("flax.linen")
nnx = pytest.importorskip("flax.nnx")
orthojax_linen = pytest.importorskip("orthojax.linen")
orthojax_nnx = pytest.importorskip("orthojax.nnx")


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


def test_a_linen_net_tells():
    net, x = LinenNet(), jnp.ones((2, 4, 4, 1))
    view = orthojax_linen.axes(net, x)
    assert fans(init_shapes(net, x), view) == {
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
    assert view["stem/kernel"].spatial == (-4, -3) and view["attention/out/kernel"].spatial == ()
    assert view["embed/embedding"] == "named embedding"
    abstract = jax.ShapeDtypeStruct(x.shape, x.dtype)
    assert orthojax_linen.axes(net, x=abstract) == view
    optax_ortho(view=view).init(init_shapes(net, x))


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
def test_layers_and_stacks_of_linen_tell(name):
    """Within an ensemble too: one more axis in front of all, as `jax.vmap` of `init` makes it."""
    make, x, blocks, matrices = LAYERS[name]
    params, view = init_shapes(Net(make), x), orthojax_linen.axes(Net(make), x)
    assert set(fans(params, view).values()) == {(blocks, *matrix) for matrix in matrices}
    right = {(7 * blocks, *matrix) for matrix in matrices}
    assert set(fans(ensemble_of(params), view).values()) == right


def ensemble_of(params):
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct((7, *a.shape), a.dtype), params)


# (7, 3, 8, 8) with nothing beside it is read as a 2-D convolution, which it nearly always is.
AMBIGUOUS = {(7, "1-D convolution, no bias")}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("members", [1, 7])
def test_parameters_alone_are_read_rightly_or_asked_about(name, members):
    make, x, blocks, matrices = LAYERS[name]
    params = init_shapes(Net(make), x)
    params = params if members == 1 else ensemble_of(params)
    right = {(members * blocks, *matrix) for matrix in matrices}
    rows = [row for row in describe(params).rows if row.path.endswith("kernel")]
    read = {(row.blocks, *row.fan) for row in rows if row.penalized}
    assert read <= right or (members, name) in AMBIGUOUS
    assert all(row.penalized or "orthojax.linen.axes(net, x)" in row.reason for row in rows)


class Level(nn.Module):
    """A layer within lifted transformations, the first of them outermost; three of each."""

    make: object
    lifts: tuple

    @nn.compact
    def __call__(self, x, _=None):
        if not self.lifts:
            self.make()(x)
            return x, None
        (kind, axis), *rest = self.lifts
        lifted = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}}
        if kind == "scan":
            level = nn.scan(Level, length=3, **lifted)
        else:
            level = nn.vmap(Level, in_axes=None, axis_size=3, **lifted)
        level(self.make, tuple(rest))(x, None)
        return x, None


def rows_of(kernel, outputs=3):
    return [kernel.reshape(-1, outputs)]


# Every axis of every kernel has three elements: shapes say nothing. Kernel to its matrices.
SQUARE = {
    "Dense": (lambda: nn.Dense(3, use_bias=False), rows_of),
    "Conv": (lambda: nn.Conv(3, (3, 3), use_bias=False), rows_of),
    "grouped": (
        lambda: nn.Conv(3, (3,), feature_group_count=3, use_bias=False),
        lambda kernel: [kernel.reshape(3, 3)[:, [group]] for group in range(3)],
    ),
    "two outputs": (
        lambda: nn.DenseGeneral((3, 3), use_bias=False),
        lambda kernel: rows_of(kernel, 9),
    ),
    "batched": (
        lambda: nn.DenseGeneral(3, batch_dims=(0, 1), use_bias=False),
        lambda kernel: list(kernel.reshape(9, 3, 3)),
    ),
    "transposed": (
        lambda: nn.ConvTranspose(3, (3,), transpose_kernel=True, use_bias=False),
        lambda kernel: rows_of(np.swapaxes(kernel, -1, -2)),
    ),
    "einsum": (
        lambda: nn.Einsum((3, 3, 3), "...ld,dlh->...lh", use_bias=False),
        lambda kernel: [kernel[:, place] for place in range(3)],
    ),
    "einsum of two inputs": (
        lambda: nn.Einsum((3, 3, 3), "...ld,hdl->...h", use_bias=False),
        lambda kernel: rows_of(np.moveaxis(kernel, 0, -1)),
    ),
}


def matrices_of(kernel, lifts, of_layer):
    if not lifts:
        return of_layer(kernel)
    (_, axis), *rest = lifts
    parts = (np.take(kernel, index, axis) for index in range(3))
    return [matrix for part in parts for matrix in matrices_of(part, rest, of_layer)]


@pytest.mark.parametrize("name", SQUARE)
def test_any_stack_is_the_matrices_that_it_was_made_of(name):
    make, of_layer = SQUARE[name]
    rng, x = np.random.default_rng(len(name)), jnp.ones((3, 3, 3, 3))
    for depth in (1, 3):
        rank = len(jax.tree.leaves(init_shapes(Level(make, ()), x))[0].shape)
        axes = [int(rng.integers(-rank - level - 1, rank + level + 1)) for level in range(depth)]
        lifts = tuple((str(rng.choice(["scan", "vmap"])), axis) for axis in reversed(axes))
        ((path, shape),) = shapes_by_path(init_shapes(Level(make, lifts), x)).items()
        axes = orthojax_linen.axes(Level(make, lifts), x)[path]
        kernel = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
        found = np.asarray(to_blocks(kernel, axes))
        found = found.reshape(len(found), -1, found.shape[-1])
        # Rows in any order: `WᵀW` does not see it.
        known = {frozenset(map(tuple, matrix)) for matrix in matrices_of(kernel, lifts, of_layer)}
        assert {frozenset(map(tuple, matrix)) for matrix in found} == known, lifts


class Asked(nn.Module):
    """What is made by nobody's layer; within a layer, beside one, and around one."""

    @nn.compact
    def __call__(self, x):
        x = x @ self.param("w", nn.initializers.ones, (8, 8)) + self.param(
            "b", nn.initializers.ones, (8,)
        )
        dense = nn.Dense(8)
        nn.share_scope(self, dense)
        return dense(x)


class Turned(nn.Dense):
    @nn.compact
    def __call__(self, x):
        return x @ self.param("kernel", nn.initializers.ones, (8, 8)).T


class Prepared(nn.Dense):
    def setup(self):
        self.w = self.param("w", nn.initializers.ones, (8, 8))


class Twice(nn.Dense):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Standardized(nn.Conv):
    def param(self, *args, **kwargs):
        value = super().param(*args, **kwargs)
        return value - jnp.mean(value)


class MadeTransposed(nn.Module):
    @nn.compact
    def __call__(self, x):
        def transpose(tree):
            return jax.tree.map(jnp.transpose, tree)

        mapped = nn.map_variables(
            lambda self: nn.Dense(8, use_bias=False, name="dense")(x),
            "params",
            transpose,
            transpose,
            init=True,
            mutable=True,
        )
        return mapped(self)


DENSE = KernelAxes((-2,), (-1,))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (Asked, {"w": None, "b": "rank 1", "kernel": DENSE, "bias": "named bias"}),
        (lambda: Turned(8), {"kernel": None}),
        (lambda: vmap(Prepared)(8), {"kernel": DENSE, "w": None, "bias": "named bias"}),
        (lambda: Twice(8), {"kernel": DENSE, "bias": "named bias"}),
        (
            lambda: Standardized(8, (3,), use_bias=False),
            {"kernel": KernelAxes((-3, -2), (-1,), (-3,))},
        ),
        (MadeTransposed, {"dense/kernel": KernelAxes((-1,), (-2,))}),
        (lambda: nn.Einsum((8, 4), "nld,dk->nl", use_bias=False), {"kernel": None}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_no_layer_makes_is_asked_about(make, expected):
    view = orthojax_linen.axes(Net(make), SEQUENCE)
    found = {path.partition("/")[2]: axes for path, axes in view.items()}
    asked = {path for path, axes in found.items() if isinstance(axes, ConfigError)}
    assert asked == {path for path, axes in expected.items() if axes is None}
    assert {k: v for k, v in found.items() if k not in asked} == {
        k: v for k, v in expected.items() if v is not None
    }
    params = init_shapes(Net(make), SEQUENCE)
    for path in asked:
        maker = next(iter(params)).rpartition("_")[0].removeprefix("Vmap")
        name = f"{next(iter(params))}/{path}"
        message = rf"'{name}' of shape .* from {maker}.*linen.axes.*'{name}': KernelAxes.*mask"
        with pytest.raises(ConfigError, match=message):
            optax_ortho(view=view).init(params)
        assert name in fans(params, view | {name: DENSE})
        assert name not in fans(params, view | {name: None})


def test_to_ask_a_net_leaves_no_trace_in_it():
    """`nn.jit` keeps what it has traced."""
    layer = nn.jit(nn.Dense)
    net = Net(lambda: layer(4))
    before = orthojax_linen.axes(net, SEQUENCE)
    assert set(shapes_by_path(init_shapes(net, SEQUENCE))) == set(before)
    assert orthojax_linen.axes(net, SEQUENCE) == before
    with pytest.raises(ConfigError, match="net=.*Dense.*must be a Flax linen module"):
        orthojax_linen.axes(nn.Dense, SEQUENCE)


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
    "a stack within one": {"scanned": {"VmapBlock_0": {"conv": {"kernel": (2, 5, 3, 4, 4)}}}},
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
    ways = "linen.axes.*nnx.axes.*overrides=.*stacked=.*mask"
    with pytest.raises(ConfigError, match=rf"(?s)'{path}' of shape .*{ways}"):
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
    assert questions(shapes(around)) == {"a/conv/kernel"}
    assert fans(shapes(around), views.flax(("a",))) == {"a/conv/kernel": (4, 24, 8)}
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
    }
    assert fans(shapes(params)) == {"scanned/dense/kernel": (5, 4, 3)}


def test_plain_layers_of_flax():
    params = {
        "scanned": {"kernel": (5, 3, 3, 4, 6)},
        "conv1d": {"kernel": (3, 4, 6)},
        "stem": {"kernel": (3, 3, 4, 6)},
        "volume": {"kernel": (3, 3, 3, 4, 6), "bias": (6,)},
        "two_inputs": {"kernel": (2, 4, 6), "bias": (6,)},
        "Dense_0": {"kernel": (4, 6)},
    }
    assert fans(shapes(params)) == {
        "scanned/kernel": (5, 36, 6),
        "conv1d/kernel": (1, 12, 6),
        "stem/kernel": (1, 36, 6),
        "volume/kernel": (1, 108, 6),
        "two_inputs/kernel": (1, 8, 6),
        "Dense_0/kernel": (1, 4, 6),
    }


class Members(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(8, 4, rngs=rngs)
        self.conv = nnx.Conv(4, 4, (3,), feature_group_count=2, rngs=rngs)
        self.up = nnx.ConvTranspose(4, 6, (3, 3), transpose_kernel=True, rngs=rngs)
        self.einsum = nnx.Einsum("nld,dhk->nlhk", (8, 2, 3), rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 4, 6, decode=False, rngs=rngs, use_bias=False)
        self.norm = nnx.RMSNorm(4, rngs=rngs)
        self.embed = nnx.Embed(3, 4, rngs=rngs)


class Own(nnx.Module):
    def __init__(self, rngs):
        self.w, self.b = nnx.Param(jnp.ones((2, 2))), nnx.Param(jnp.ones(2))


def test_an_nnx_model_tells():
    one = {
        "linear/kernel": (1, 8, 4),
        "conv/kernel": (2, 6, 2),
        "up/kernel": (1, 36, 6),
        "einsum/kernel": (1, 8, 6),
        **{f"attention/{name}/kernel": (1, 4, 6) for name in ("query", "key", "value")},
        "attention/out/kernel": (1, 6, 4),
    }
    model = nnx.eval_shape(lambda: Members(nnx.Rngs(0)))
    view = orthojax_nnx.axes(model)
    params = nnx.state(model, nnx.Param)
    assert fans(params, view) == one
    assert view["conv/kernel"].spatial == (-3,) and view["embed/embedding"] == "named embedding"
    stack = nnx.split_rngs(splits=5)(nnx.vmap(Members))
    stack = nnx.eval_shape(lambda: stack(nnx.Rngs(0)))
    stacked = {path: (5 * blocks, *fan) for path, (blocks, *fan) in one.items()}
    assert fans(nnx.state(stack, nnx.Param), orthojax_nnx.axes(stack)) == stacked
    # Of the parameters alone all that is read is right, and what is asked about leads to the model.
    rows = [row for row in describe(params).rows if row.path in one]
    assert all("orthojax.nnx.axes" in row.reason for row in rows if not row.penalized)
    grouped = {"conv/kernel": (1, 6, 4)}
    assert {r.path: (r.blocks, *r.fan) for r in rows if r.penalized}.items() <= (
        one | grouped
    ).items()


def test_an_nnx_module_of_somebody_is_asked_about():
    view = orthojax_nnx.axes(Own(nnx.Rngs(0)))
    assert view["b"] == "rank 1"
    with pytest.raises(ConfigError, match=r"'w' of shape \(2, 2\), from Own.*nnx.axes.*'w': Kern"):
        optax_ortho(view=view).init({"w": jnp.ones((2, 2)), "b": jnp.ones(2)})
    # A kernel that has not the shape that its layer says.
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    layer.kernel = nnx.Param(jnp.ones((2, 5, 3)))
    assert isinstance(orthojax_nnx.axes(layer)["kernel"], ConfigError)
    with pytest.raises(ConfigError, match="model=.*must be an NNX module"):
        orthojax_nnx.axes(nnx.state(layer))


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
            "own_name": {"w": (4, 3), "b": (3,)},
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
        "own_name/w": (1, 4, 3),
    }
    stack = shapes({"own_name": {"w": (6, 4, 3), "b": (6, 3)}})
    assert questions(stack, views.haiku()) == {"own_name/w"}
    assert fans(stack, views.haiku(("own",))) == {"own_name/w": (6, 4, 3)}


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
