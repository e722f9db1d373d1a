"""Users' own training steps on 8 devices, by `pmap` and by `shard_map`: both ideas inside."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from orthojax import init_site, modulate, modulation, optax_ortho
from orthojax.sites import SITE

DEVICES, DEPTH, WIDTH, BATCH, STEPS = 8, 5, 12, 16, 6
OPTIMIZER = modulation(
    optax.chain(optax_ortho(0.05), optax.sgd(0.02, momentum=0.9)), tolerance=1.0, decay=0.5
)
GAINS = (3.0, 0.2, 5.0, 0.1, 2.0)  # unequal, so that every site has something to rescale


def loss_function(params, x, average=lambda y: y):
    for gain, layer in zip(GAINS, params, strict=True):
        x = jnp.tanh(modulate(gain * x @ layer["kernel"], layer[SITE]))
    return average(jnp.mean(jnp.square(x - 1)))


def update(params, grads, opt_state):
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def joint_step(params, opt_state, x):
    """What each device would do with its share, one after the other, and the mean of it."""
    shares = x.reshape(DEVICES, BATCH, WIDTH)
    per_share = jax.vmap(jax.value_and_grad(loss_function), in_axes=(None, 0))(params, shares)
    loss, grads = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), per_share)
    params, opt_state = update(params, grads, opt_state)
    return params, opt_state, loss


def pmap_step(params, opt_state, x):
    def one_of_many(params, opt_state, x):
        loss, grads = jax.lax.pmean(jax.value_and_grad(loss_function)(params, x), "devices")
        params, opt_state = update(params, grads, opt_state)
        return params, opt_state, loss

    step = jax.pmap(one_of_many, axis_name="devices", in_axes=(None, None, 0))
    result = step(params, opt_state, x.reshape(DEVICES, BATCH, WIDTH))
    return jax.tree.map(lambda leaf: leaf[0], result)


@jax.jit
def shard_map_step(params, opt_state, x):
    """With the default checks: the mean stands in the loss, and gradients come back summed."""

    def one_of_many(params, opt_state, x):
        def average(loss):
            return jax.lax.pmean(loss, "devices")

        loss, grads = jax.value_and_grad(loss_function)(params, x, average)
        params, opt_state = update(params, grads, opt_state)
        return params, opt_state, loss

    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
    whole, split = PartitionSpec(), PartitionSpec("devices")
    step = jax.shard_map(one_of_many, mesh=mesh, in_specs=(whole, whole, split), out_specs=whole)
    return step(params, opt_state, x)


def run(step):
    keys = jax.random.split(jax.random.key(0), DEPTH)
    params = [
        {"kernel": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5, SITE: init_site(index)}
        for index, key in enumerate(keys)
    ]
    opt_state, losses = OPTIMIZER.init(params), []
    for index in range(STEPS):
        x = jax.random.normal(jax.random.key(100 + index), (DEVICES * BATCH, WIDTH))
        params, opt_state, loss = step(params, opt_state, x)
        losses.append(float(loss))
    return params, opt_state, losses


@pytest.fixture(scope="module")
def joint():
    return run(jax.jit(joint_step))


@pytest.mark.parametrize("step", [pmap_step, shard_map_step])
def test_eight_devices_train_like_one_that_takes_their_shares_in_turn(step, joint):
    (params, state, losses), (expected, expected_state, expected_losses) = run(step), joint
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for layer, expected_layer in zip(params, expected, strict=True):
        np.testing.assert_allclose(layer["kernel"], expected_layer["kernel"], atol=5e-6)
    scales = np.asarray(list(state.scales.values()))
    assert (np.abs(np.log(scales[:-1])) > 0.05).all()  # every site does rescale
    np.testing.assert_allclose(scales, list(expected_state.scales.values()), rtol=1e-4)
