"""Users' own training steps on 8 devices, by `pmap` and by `shard_map`: both ideas inside."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, PartitionSpec

from orthojax import Policy, first_link, init_state, modulate, optax_ortho, read

DEVICES, DEPTH, WIDTH, BATCH, STEPS = 8, 5, 12, 16, 6
POLICY = Policy(tolerance=0.0, decay=0.5, max_scale=100.0)
OPTIMIZER = optax.chain(optax_ortho(0.05), optax.sgd(0.02, momentum=0.9))
GAINS = (3.0, 0.2, 5.0, 0.1, 2.0)  # unequal, so that every site has something to rescale


def loss_function(params, states, x):
    link = first_link()
    for gain, layer, state in zip(GAINS, params, states, strict=True):
        x, link = modulate(gain * x @ layer["kernel"], link, state, POLICY)
        x = jnp.tanh(x)
    return jnp.mean(jnp.square(x - 1))


def backward(params, states, x):
    return jax.value_and_grad(loss_function, argnums=(0, 1))(params, states, x)


def update(params, grads, opt_state):
    updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def joint_step(params, states, opt_state, x):
    loss, (grads, states) = backward(params, states, x)
    params, opt_state = update(params, grads, opt_state)
    return params, states, opt_state, loss


def one_of_many(params, states, opt_state, x):
    """The same with the mean over devices: of gradients and states together."""
    loss, (grads, states) = jax.lax.pmean(backward(params, states, x), "devices")
    params, opt_state = update(params, grads, opt_state)
    return params, states, opt_state, loss


def pmapped(params, states, opt_state, x):
    step = jax.pmap(one_of_many, axis_name="devices", in_axes=(None, None, None, 0))
    result = step(params, states, opt_state, x.reshape(DEVICES, BATCH, WIDTH))
    return jax.tree.map(lambda leaf: leaf[0], result)


@jax.jit
def shard_mapped(params, states, opt_state, x):
    mesh = jax.make_mesh((DEVICES,), ("devices",), axis_types=(AxisType.Auto,))
    whole, split = PartitionSpec(), PartitionSpec("devices")
    step = jax.shard_map(
        one_of_many,
        mesh=mesh,
        in_specs=(whole, whole, whole, split),
        out_specs=whole,
        check_vma=False,
    )
    return step(params, states, opt_state, x)


def run(step):
    keys = jax.random.split(jax.random.key(0), DEPTH)
    params = [{"kernel": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5} for key in keys]
    states, opt_state, losses = [init_state() for _ in params], OPTIMIZER.init(params), []
    for index in range(STEPS):
        x = jax.random.normal(jax.random.key(100 + index), (DEVICES * BATCH, WIDTH))
        params, states, opt_state, loss = step(params, states, opt_state, x)
        losses.append(float(loss))
    return params, read(jnp.stack(states)), losses


@pytest.fixture(scope="module")
def joint():
    return run(jax.jit(joint_step))


@pytest.mark.parametrize("step", [pmapped, shard_mapped])
def test_eight_devices_train_like_one_with_the_joint_batch(step, joint):
    (params, moments, losses), (expected, expected_moments, expected_losses) = run(step), joint
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for layer, expected_layer in zip(params, expected, strict=True):
        np.testing.assert_allclose(layer["kernel"], expected_layer["kernel"], atol=2e-6)
    assert (jnp.abs(jnp.log(moments.scale[:-1])) > 0.1).all()  # every site does rescale
    np.testing.assert_allclose(moments.scale, expected_moments.scale, rtol=1e-4)
    # The mean over an eighth of the batch has errors 8 times those of the joint mean.
    np.testing.assert_allclose(
        moments.second_moment, DEVICES**2 * expected_moments.second_moment, rtol=1e-4
    )


def test_the_comparison_can_tell(joint):
    """Without the penalty, or with a state left as it was, the kernels are others."""

    def without_penalty(params, states, opt_state, x):
        loss, (grads, states) = backward(params, states, x)
        updates, rest = OPTIMIZER.update(grads, opt_state, jax.tree.map(jnp.zeros_like, params))
        return optax.apply_updates(params, updates), states, rest, loss

    def frozen(params, states, opt_state, x):
        new, _, opt_state, loss = joint_step(params, states, opt_state, x)
        return new, states, opt_state, loss

    for step in (without_penalty, frozen):
        kernels = [layer["kernel"] for layer in run(jax.jit(step))[0]]
        expected = [layer["kernel"] for layer in joint[0]]
        assert not np.allclose(kernels, expected, atol=1e-3)
