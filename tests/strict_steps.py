"""Training steps for `test_strict_modes`, which runs this file in a process of each mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import orthojax
from orthojax.initializers import carrying
from orthojax.models import BatchNorm, OrthogonalConv, PlainNet

KEY = jax.random.key(0)
TRANSFORMATIONS = {
    "coupled": functools.partial(orthojax.optax_ortho, 0.1),
    **{
        method: functools.partial(orthojax.stiefel, optax.sgd(0.1, momentum=0.9), method)
        for method in ("polar", "qr", "pogo", "landing")
    },
    "scheduled": lambda: orthojax.optax_ortho(optax.linear_schedule(0.1, 0.0, 10)),
    "decoupled": lambda: orthojax.decoupled_ortho(np.float64(0.1)),
    "matrix Adam": orthojax.scale_by_matrix_adam,
    "SOAP": orthojax.scale_by_soap,
    "modulation": lambda: orthojax.modulation(optax.sgd(0.1, momentum=0.9)),
    "constant": lambda: orthojax.modulation(
        optax.sgd(0.1), reference=1.0, steps=np.int64(5), tolerance=np.float64(2)
    ),
    "injected": lambda: optax.inject_hyperparams(
        orthojax.modulation, static_args="inner", hyperparam_dtype=jnp.float32
    )(optax.sgd(0.1)),
}


def loss(params):
    x = jnp.ones((3, 4), params[0]["kernel"].dtype)
    for layer in params:
        x = orthojax.modulate(x @ layer["kernel"], layer["modulation_site"])
    return jnp.mean(jnp.square(x)).astype(jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_transformation(name, dtype):
    if dtype == "float64" and not jax.config.read("jax_enable_x64"):
        pytest.skip("only with x64")
    tx = TRANSFORMATIONS[name]()
    params = [
        {"kernel": jax.random.normal(KEY, shape).astype(dtype), "modulation_site": site}
        for site, shape in zip(map(orthojax.init_site, range(2)), ((4, 6), (6, 4)), strict=True)
    ]
    state = tx.init(params)
    for _ in range(2):
        updates, after = jax.jit(tx.update)(jax.grad(loss)(params), state, params)
        for before, now in ((params, updates), (state, after)):
            types = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (before, now)]
            assert types[0] == types[1]
        params = jax.tree.map(lambda p, u: p + u, params, updates)
        state = after
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_and_initializers(dtype):
    x = jax.random.normal(KEY, (2, 4, 4, 4)).astype(dtype)
    for layer in (
        OrthogonalConv(4, (3, 3), param_dtype=dtype),
        BatchNorm(False, relu=True, modulated=True, groups=2, dtype=dtype),
    ):
        variables = layer.init(KEY, x)
        gradient = jax.grad(
            lambda p, layer=layer, v=variables: jnp.sum(
                layer.apply({**v, "params": p}, x, mutable=["batch_stats"])[0].astype(jnp.float32)
            )
        )
        assert jax.tree.map(jnp.shape, gradient(variables["params"]))
    for make in (orthojax.orthonormal, orthojax.delta_orthonormal):
        assert make(gain=np.float64(2))(KEY, (3, 3, 4, 6), dtype).dtype == dtype
    assert carrying(np.float64(0.5))(KEY, (3, 3, 4, 4), dtype).dtype == dtype


@pytest.mark.parametrize(
    "options",
    [
        {"modulated": True, "kernel_init": "delta_orthonormal", "bn_groups": 2},
        {"modulated": True, "dtype": jnp.bfloat16, "remat": "segments"},
        {"norm": "none", "activation": "tailored_relu", "scan": False},
        {"activation": "shifted_relu", "parametrization": "dirac", "remat": "blocks"},
        {"activation": "crelu", "kernel_init": "he"},
        {"activation": "prelu", "kernel_init": "carrying", "carry": 0.5},
        {"parametrization": "repvgg", "kernel_init": "he"},
    ],
)
def test_a_net(options):
    net, images = PlainNet(depth=14, width=2, **options), jnp.ones((2, 8, 8, 3), jnp.float32)
    variables = jax.eval_shape(lambda: net.init(KEY, images, train=False))

    def logits(variables, params):
        state = {**variables, "params": params}
        return jnp.sum(net.apply(state, images, train=True, mutable=["batch_stats"])[0])

    gradient = jax.eval_shape(
        lambda variables: jax.grad(lambda p: logits(variables, p))(variables["params"]), variables
    )
    assert jax.tree.structure(gradient) == jax.tree.structure(variables["params"])
