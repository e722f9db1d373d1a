"""Which axes the ready-made views see, on real modules of Flax and on the layouts of the others."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orthojax.describe import describe
from orthojax.errors import ConfigError
from orthojax.matrices import KernelAxes
from orthojax.ortho import optax_ortho, orthonormality_error, views


def fans(params, view=None):
    """`{path: (blocks, f_in, f_out)}` of what is penalised."""
    rows = describe(params, view=view).rows
    return {row.path: (row.blocks, *row.fan) for row in rows if row.penalised}


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
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
    model = LinenNet()
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((2, 4, 4, 1)))["params"]
    view = views.flax_linen(feature_groups={"grouped/*": 2})
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


def test_flax_nnx_in_its_own_optimizer():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.head = nnx.LinearGeneral((2, 4), 3, axis=(-2, -1), rngs=rngs)
            self.lora = nnx.LoRA(4, 2, 4, rngs=rngs)

    model = Net(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    assert fans(params, views.flax_nnx()) == {"conv/kernel": (1, 27, 4), "head/kernel": (1, 8, 3)}
    transformation = optax.chain(optax_ortho(1.0, view=views.flax_nnx()), optax.sgd(0.02))
    optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)
    before = orthonormality_error(params, view=views.flax_nnx())

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))

    for _ in range(5):
        step(model, optimizer)
    after = orthonormality_error(nnx.state(model, nnx.Param), view=views.flax_nnx())
    assert all(after[path] < 0.9 * before[path] for path in before)


def shapes(tree):
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        tree,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def test_haiku():
    params = shapes(
        {
            "net/~/conv2_d": {"w": (3, 3, 2, 4), "b": (4,)},
            "net/~/conv3_d": {"w": (3, 3, 3, 2, 4)},
            "net/~/conv2_d_transpose": {"w": (2, 2, 5, 3), "b": (5,)},
            "net/~/depthwise_conv2_d": {"w": (3, 3, 1, 4)},
            "net/~/batch_norm": {"scale": (1, 1, 1, 4), "offset": (1, 1, 1, 4)},
            "net/~/embed": {"embeddings": (9, 4)},
            "net/__layer_stack_no_per_layer/linear": {"w": (6, 4, 4), "b": (6, 4)},
        }
    )
    assert fans(params, views.haiku()) == {
        "net/~/conv2_d/w": (1, 18, 4),
        "net/~/conv3_d/w": (1, 54, 4),
        "net/~/conv2_d_transpose/w": (1, 12, 5),
        "net/~/depthwise_conv2_d/w": (4, 9, 1),
        "net/__layer_stack_no_per_layer/linear/w": (6, 4, 4),
    }


def test_equinox():
    params = shapes(
        {
            "layers": [
                {"weight": (4, 2, 3, 3), "bias": (4, 1, 1)},
                {"weight": (3, 4), "bias": (3,)},
            ],
            "depthwise": {"weight": (4, 1, 3, 3)},
            "norm": {"weight": (4, 4), "bias": (4, 4)},
            "embedding": {"weight": (9, 4)},
            "scanned": {"weight": (6, 4, 4), "bias": (6, 4)},
            "cell": {"weight_hh": (12, 4)},
        }
    )
    assert fans(params, views.equinox()) == {
        "layers/0/weight": (1, 18, 4),
        "layers/1/weight": (1, 4, 3),
        "depthwise/weight": (4, 9, 1),
        "scanned/weight": (6, 4, 4),
        "cell/weight_hh": (1, 4, 12),
    }


def test_layouts_agree():
    """One convolution in the layouts of Flax and of Equinox gets one and the same gradient."""
    kernel = np.random.default_rng(0).normal(size=(3, 3, 4, 6)).astype(np.float32)
    flax = {"kernel": jnp.asarray(kernel)}
    oihw = {"weight": jnp.asarray(kernel.transpose(3, 2, 0, 1))}
    for variant in ("frobenius", "conv"):
        ours, _ = optax_ortho(1.0, variant=variant).update(flax, (), flax)
        theirs, _ = optax_ortho(1.0, variant=variant, view=views.equinox()).update(oihw, (), oihw)
        np.testing.assert_allclose(
            ours["kernel"] - flax["kernel"],
            (theirs["weight"] - oihw["weight"]).transpose(2, 3, 1, 0),
            rtol=1e-4,
            atol=1e-4,
        )


def test_arguments_of_the_linen_view():
    kernel = jax.ShapeDtypeStruct((5, 3, 3, 4, 6), jnp.float32)
    with pytest.raises(ConfigError, match=r"(?s)'net/blocks/kernel' of shape.*stacked="):
        views.flax_linen()("net/blocks/kernel", kernel)
    assert views.flax_linen(("blocks",))("net/blocks/kernel", kernel).inputs == (1, 2, 3)
    volume = KernelAxes((0, 1, 2, 3), (4,), spatial=(0, 1, 2))
    assert views.flax_linen(overrides={"net/*": volume})("net/blocks/kernel", kernel) == volume
    twice = views.flax_linen(("outer", "inner"))("outer/inner/kernel", kernel)
    assert twice.inputs == (2, 3) and twice.stack(5) == (0, 1)
    strided = views.flax_linen(("blocks",), strides={"*/kernel": 2})("net/blocks/kernel", kernel)
    assert strided.strides == 2 and strided.spatial == (1, 2)
    assert views.flax_linen(transposed=("up",))(
        "up/kernel", jax.ShapeDtypeStruct((2, 2, 8, 3), jnp.float32)
    ).outputs == (2,)


def test_stacked_biases_and_scales_are_left_alone():
    params = shapes(
        {
            "scanned": {
                "conv": {"kernel": (5, 3, 3, 4, 4), "bias": (5, 4)},
                "norm": {"scale": (5, 4), "bias": (5, 4)},
                "gate": {"weights": (5, 4)},
                "dense": {"kernel": (5, 4, 3)},
            },
            "attention": {"query": {"kernel": (4, 2, 3), "bias": (2, 3)}},
        }
    )
    assert fans(params) == {
        "attention/query/kernel": (1, 4, 6),
        "scanned/conv/kernel": (5, 36, 4),
        "scanned/dense/kernel": (5, 4, 3),
    }


def test_what_a_view_must_return():
    params = {"kernel": jnp.ones((3, 3))}
    for view, message in [
        (lambda path, array: (0, 1), "returned"),
        (lambda path, array: KernelAxes((0,), (2,)), "rank 2"),
        (lambda path, array: KernelAxes((0,), (1,), feature_groups=2), "feature_groups"),
    ]:
        with pytest.raises(ConfigError, match=rf"(?s)'kernel' of shape \(3, 3\).*{message}"):
            optax_ortho(view=view).init(params)
    assert not fans(params, lambda path, array: "frozen")
    assert not fans({"kernel": jnp.ones((3, 3), int)})


def test_describe():
    params = {
        "stem": {"kernel": jnp.zeros((3, 3, 3, 64)), "bias": jnp.zeros(64)},
        "scanned": {"kernel": jnp.stack([jnp.eye(4), 2 * jnp.eye(4)])},
        "video": {"kernel": jnp.zeros((3, 3, 3, 2, 2))},
        "scale": jnp.ones(()),
    }
    table = describe(params, mask=lambda p: {**dict.fromkeys(p, True), "scale": False})
    rows = {row.path: row for row in table.rows}
    assert rows["stem/kernel"].groups == (27, 27, 10) and rows["stem/kernel"].error == 1.0
    assert rows["scanned/kernel"].blocks == 2 and rows["scanned/kernel"].error == 3.0
    assert not rows["stem/bias"].penalised and rows["scale"].reason == "masked"
    assert rows["video/kernel"].reason.startswith("ERROR")
    text = str(table)
    assert "2×27 + 10" in text and text.endswith("2 of 5 parameters penalised")
    without_values = describe(jax.eval_shape(lambda: params))
    assert all(row.error is None for row in without_values.rows)
