"""`orthojax.linen.Modulated` around models that know nothing of it, in Flax's own train state."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState

import orthojax
from orthojax.errors import ConfigError
from orthojax.linen import Modulated, axes
from orthojax.sites import SITE, measurement, weights_only
from orthojax.sites.modulation import find_state

DEPTH, WIDTH, BATCH = 50, 8, 32


class Block(nn.Module):
    """A stranger's: Dense, its own normalization, ReLU."""

    @nn.compact
    def __call__(self, x, _):
        x = nn.Dense(WIDTH, use_bias=False)(x)
        x = (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5)
        return nn.relu(x), None


class Deep(nn.Module):
    """A stranger's 50-layer net; nothing here is ours."""

    depth: int = DEPTH
    scan: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="stem")(x)
        if self.scan:
            blocks = nn.scan(
                nn.remat(Block, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = blocks(name="blocks")(x, None)
        else:
            for index in range(self.depth):
                x, _ = Block(name=f"block_{index}")(x, None)
        return nn.Dense(3, name="head")(x)


def batch():
    return jax.random.normal(jax.random.key(1), (BATCH, WIDTH))


def loss_of(net, params, x):
    return jnp.mean(jnp.square(net.apply({"params": params}, x) - 1))


def init(net, x):
    return jax.jit(net.init)(jax.random.key(0), x)["params"]


@functools.partial(jax.jit, static_argnums=0)
def gradients(net, params, x):
    return jax.grad(lambda params: loss_of(net, params, x))(params)


def without_sites(params):
    """The tree that the bare model has."""
    if not isinstance(params, dict):
        return params
    return {name: without_sites(value) for name, value in params.items() if name != SITE}


def test_four_lines_train_a_deep_net_that_is_not_edited():
    x = batch()
    net = Modulated(Deep())
    ortho = orthojax.optax_ortho(1e-4, view=axes(net, x))
    tx = orthojax.modulation(optax.chain(ortho, optax.sgd(0.03, momentum=0.9)), tolerance=1.0)
    params = init(net, x)
    state = TrainState.create(apply_fn=net.apply, params=params, tx=tx)

    @jax.jit
    def train_step(state):
        loss, grads = jax.value_and_grad(lambda p: loss_of(net, p, x))(state.params)
        return state.apply_gradients(grads=grads), loss, grads

    losses = []
    for _ in range(30):
        state, loss, grads = train_step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    sites = [state.params[name][SITE] for name in ("stem", "head")]
    sites.insert(1, state.params["blocks"]["Dense_0"][SITE])
    assert (sites[0][2] < sites[1][:, 2]).all() and sites[2][2] == -1
    measured = find_state(state.opt_state)
    assert measured.moments[f"blocks/Dense_0/{SITE}"].shape == (DEPTH,)

    # Of the last step: the gradient is the true one times the scales of the sites above.
    true = gradients(Deep(), without_sites(state.params), x)
    after, _, grads = train_step(state)
    scales = find_state(after.opt_state).scales[f"blocks/Dense_0/{SITE}"]
    product = np.cumprod(np.asarray(scales, np.float64)[::-1])[::-1]
    kernels = grads["blocks"]["Dense_0"]["kernel"]
    expected = np.asarray(true["blocks"]["Dense_0"]["kernel"]) * product[:, None, None]
    error = np.linalg.norm(kernels - expected, axis=(1, 2))
    assert (error < 1e-3 * np.linalg.norm(expected, axis=(1, 2))).all()
    assert np.abs(np.log(product)).max() > 1


def test_parameters_are_those_of_the_model_and_its_checkpoints_fit():
    x, net = batch(), Deep(depth=4)
    bare, wrapped = init(net, x), init(Modulated(net), x)
    jax.tree.map(np.testing.assert_array_equal, without_sites(wrapped), bare)
    sizes = [jax.tree.map(jnp.size, t) for t in (weights_only(wrapped), bare)]
    assert sum(jax.tree.leaves(sizes[0])) == sum(jax.tree.leaves(sizes[1]))
    # Parameters without sites are the bare model, forward and backward.
    expected = jax.jit(net.apply)({"params": bare}, x)
    for params in (bare, wrapped):
        found = jax.jit(Modulated(net).apply)({"params": params}, x)
        np.testing.assert_array_equal(found, expected)
    backward = [gradients(model, bare, x) for model in (Modulated(net), net)]
    jax.tree.map(np.testing.assert_array_equal, *backward)


def test_scanned_and_unrolled_measure_the_same():
    x, depth = batch(), 3
    unrolled = Modulated(Deep(depth, scan=False))
    params = init(unrolled, x)
    blocks = [params[f"block_{index}"] for index in range(depth)]
    positions = [block["Dense_0"][SITE][2] for block in blocks]
    np.testing.assert_array_equal(positions, np.arange(1, depth + 1))  # the stem is 0
    stacked = {name: params[name] for name in ("stem", "head")}
    stacked["blocks"] = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)

    def bounded(params):
        def bound(path, leaf):
            return jnp.asarray(leaf).at[..., :2].set(1e-3) if path[-1].key == SITE else leaf

        return jax.tree_util.tree_map_with_path(bound, params)

    one = gradients(unrolled, bounded(params), x)
    many = gradients(Modulated(Deep(depth)), bounded(stacked), x)
    for index in range(depth):
        for name, leaf in one[f"block_{index}"]["Dense_0"].items():
            np.testing.assert_allclose(
                many["blocks"]["Dense_0"][name][index], leaf, rtol=1e-3, atol=1e-6
            )


class Other(nn.Module):
    """Convolutions, a layer used twice, branches, dropout, batch statistics, two outputs."""

    @nn.compact
    def __call__(self, x, *, train: bool):
        x = nn.Conv(4, (3, 3))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        shared = nn.Conv(4, (1, 1), name="shared")
        x = x + shared(nn.relu(shared(x)))
        x = nn.Dropout(0.1, deterministic=not train)(x)
        x = nn.ConvTranspose(2, (2, 2), strides=(2, 2))(x)
        flat = x.reshape(len(x), -1)
        return {"a": nn.Dense(3, name="a")(flat), "b": nn.log_softmax(nn.Dense(5, name="b")(flat))}


@functools.cache
def other():
    x = jax.random.normal(jax.random.key(2), (2, 4, 4, 3))
    net = Modulated(Other())
    return net, x, jax.jit(functools.partial(net.init, train=False))(jax.random.key(0), x)


def test_positions_follow_the_calls_and_outputs_are_marked():
    _, _, variables = other()
    sites = {
        name: float(layer[SITE][2]) for name, layer in variables["params"].items() if SITE in layer
    }
    # The shared layer keeps the position of its first call.
    assert sites == {"Conv_0": 0, "shared": 1, "ConvTranspose_0": 3, "a": -1, "b": -1}


def test_branches_shared_layers_and_collections():
    """The site of a layer that is used twice measures the mean over its uses."""
    net, x, variables = other()

    def loss(params):
        outputs, updated = net.apply(
            {**variables, "params": params},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(3)},
        )
        return sum(jnp.sum(jnp.sin(y)) for y in jax.tree.leaves(outputs)), updated

    grads, updated = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert "batch_stats" in updated
    weights = {n: float(measurement(g[SITE])[1]) for n, g in grads.items() if SITE in g}
    assert weights == {"Conv_0": 1, "shared": 2, "ConvTranspose_0": 1, "a": 1, "b": 1}


def test_where_chooses_by_module_and_path():
    def where(module, path):
        return isinstance(module, nn.Dense) and path[0] == "block_1"

    params = init(Modulated(Deep(3, scan=False), where), batch())
    assert [name for name in params if SITE in str(jax.tree.structure(params[name]))] == ["block_1"]
    whole = Modulated(Deep(3, scan=False), where=lambda module, path: isinstance(module, Block))
    with pytest.raises(ConfigError, match="chose block_0, a Block, .* returns a tuple"):
        init(whole, batch())


def test_members_of_a_flax_ensemble_have_sites_of_their_own():
    ensemble = nn.vmap(
        Deep, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, axis_size=2
    )
    net, x = Modulated(ensemble(depth=2)), batch()
    params = init(net, x)
    assert params["blocks"]["Dense_0"][SITE].shape == (2, 2, 3)
    grads = gradients(net, params, x)
    alone = jax.jit(jax.grad(lambda params: loss_of(Modulated(Deep(2)), params, x) / 2))
    for member in range(2):
        own, found = (jax.tree.map(lambda leaf, m=member: leaf[m], t) for t in (params, grads))
        chex.assert_trees_all_close(found, alone(own), rtol=1e-4, atol=1e-7)


def test_evaluation_without_sites_and_jvp():
    """Inference needs parameters alone, and forward mode goes through the bare net."""
    net, x = Modulated(Deep(2)), batch()
    bare = {"params": without_sites(init(net, x))}
    y, tangent = jax.eval_shape(lambda x: jax.jvp(lambda x: net.apply(bare, x), (x,), (x,)), x)
    assert y.shape == tangent.shape == (BATCH, 3)
