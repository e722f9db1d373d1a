"""Modulation in training loops of Flax NNX, Equinox, Haiku, linen and plain JAX, on the digits.

Each framework builds the same little net and hands back the same few things, so that one set of
tests holds for all of them.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from orthojax import (
    Policy,
    first_link,
    init_state,
    modulate,
    read,
)
from orthojax.linen import MOMENTS, Modulation
from tests.digits_batch import cross_entropy, digits

pytestmark = pytest.mark.usefixtures("quick_compilation")

DEPTH, WIDTH, STEPS = 4, 16, 30
GAINS = (3.0, 0.5, 2.0, 0.4)  # so that the error changes size from layer to layer
EAGER = Policy(tolerance=0.0, max_scale=1e6)  # rescales every pair, whatever the mismatch


class Passes(NamedTuple):
    """A net of `DEPTH` dense layers with a modulation site each, and what was done with it.

    Attributes:
      true: gradients without modulation, `[(kernel, bias), ...]` from the bottom to the top.
      states: what one pass measured, `(DEPTH, 7)`.
      modulated: gradients of the next pass on the same parameters.
      losses: of training on from there.
      final_states: the states after that, `(DEPTH, 7)`.
      optimizer_shapes: of all arrays in the optimizer's state.
    """

    true: Any
    states: jax.Array
    modulated: Any
    losses: list[float]
    final_states: jax.Array
    optimizer_shapes: set[tuple[int, ...]]


def shapes_of(tree):
    return {jnp.shape(leaf) for leaf in jax.tree.leaves(tree)}


def optimizer():
    return optax.adam(1e-2)


def widths():
    return zip([64] + [WIDTH] * (DEPTH - 1), [WIDTH] * (DEPTH - 1) + [10], strict=True)


def modulated_in_plain_jax():
    def forward(params, states, x, policy):
        link = first_link()
        for index, (kernel, bias) in enumerate(params):
            x = GAINS[index] * (jnp.tanh(x) if index else x) @ kernel + bias
            if policy is not None:
                x, link = modulate(x, link, states[index], policy)
        return x

    images, labels = digits()
    images = images.reshape(len(images), -1)

    @functools.partial(jax.jit, static_argnames="policy")
    def backward(params, states, policy=EAGER):
        def loss(params, states):
            return cross_entropy(forward(params, states, images, policy), labels)

        return jax.value_and_grad(loss, argnums=(0, 1))(params, states)

    @jax.jit
    def step(params, states, opt_state):
        loss, (grads, states) = backward(params, states)
        updates, opt_state = optimizer().update(grads, opt_state, params)
        return optax.apply_updates(params, updates), states, opt_state, loss

    keys = jax.random.split(jax.random.key(0), DEPTH)
    init = jax.nn.initializers.lecun_normal()
    params = [
        (init(k, shape), jnp.zeros(shape[1])) for k, shape in zip(keys, widths(), strict=True)
    ]
    opt_state, losses = optimizer().init(params), []
    true, states = backward(params, [init_state()] * DEPTH, None)[1][0], [init_state()] * DEPTH
    states = backward(params, states)[1][1]
    measured, modulated = states, backward(params, states)[1][0]
    for _ in range(STEPS):
        params, states, opt_state, loss = step(params, states, opt_state)
        losses.append(float(loss))
    shapes = shapes_of(opt_state)
    return Passes(true, jnp.stack(measured), modulated, losses, jnp.stack(states), shapes)


def modulated_in_nnx():
    class Moments(nnx.Variable):
        """States of modulation sites: not `nnx.Param`, so that no optimizer takes them."""

    class Net(nnx.Module):
        def __init__(self, policy, rngs):
            self.policy = policy
            self.layers = nnx.List([nnx.Linear(*shape, rngs=rngs) for shape in widths()])
            self.moments = nnx.List([Moments(init_state()) for _ in range(DEPTH)])

        def __call__(self, x):
            link = first_link()
            for index, layer in enumerate(self.layers):
                x = layer(GAINS[index] * (nnx.tanh(x) if index else x))
                if self.policy is not None:
                    x, link = modulate(x, link, self.moments[index][...], self.policy)
            return x

    images, labels = digits()
    images = images.reshape(len(images), -1)
    both = nnx.DiffState(0, (nnx.Param, Moments))

    @nnx.jit
    def backward(net):
        grad = nnx.value_and_grad(lambda net: cross_entropy(net(images), labels), argnums=both)
        loss, grads = grad(net)
        return loss, *nnx.split_state(grads, nnx.Param, Moments)

    @nnx.jit
    def step(net, optimizer):
        loss, grads, moments = backward(net)
        optimizer.update(net, grads)
        nnx.update(net, moments)
        return loss

    def as_layers(grads):
        layers = grads["layers"]
        pairs = [(layers[i]["kernel"], layers[i]["bias"]) for i in range(DEPTH)]
        return [tuple(variable[...] for variable in pair) for pair in pairs]

    def states(net):
        return jnp.stack([moments[...] for moments in net.moments])

    def make(policy):
        return nnx.jit(lambda: Net(policy, nnx.Rngs(0)))()

    true = as_layers(backward(make(None))[1])
    net = make(EAGER)
    nnx.update(net, backward(net)[2])
    measured, modulated = states(net), as_layers(backward(net)[1])
    adam = nnx.Optimizer(net, optimizer(), wrt=nnx.Param)
    losses = [float(step(net, adam)) for _ in range(STEPS)]
    shapes = shapes_of(nnx.state(adam))
    return Passes(true, measured, modulated, losses, states(net), shapes)


def modulated_in_equinox():
    eqx = pytest.importorskip("equinox")

    class Site(eqx.Module):
        moments: jax.Array
        policy: Policy | None = eqx.field(static=True)

        def __call__(self, x, link):
            if self.policy is None:
                return x, link
            return modulate(x, link, self.moments, self.policy)

    class Net(eqx.Module):
        layers: list[eqx.nn.Linear]
        sites: list[Site]

        def __init__(self, policy, key):
            keys = jax.random.split(key, DEPTH)
            shapes = zip(widths(), keys, strict=True)
            self.layers = [eqx.nn.Linear(*shape, key=key) for shape, key in shapes]
            self.sites = [Site(init_state(), policy) for _ in range(DEPTH)]

        def __call__(self, x):  # a batch: the moments are over examples too
            link = first_link()
            for index, (layer, site) in enumerate(zip(self.layers, self.sites, strict=True)):
                x = jax.vmap(layer)(GAINS[index] * (jnp.tanh(x) if index else x))
                x, link = site(x, link)
            return x

    def moments_of(net):
        return [site.moments for site in net.sites]

    def without_moments(net):
        return eqx.tree_at(moments_of, net, replace_fn=lambda _: None)

    images, labels = digits()
    images = images.reshape(len(images), -1)

    @eqx.filter_jit
    def backward(net):
        loss, grads = eqx.filter_value_and_grad(lambda net: cross_entropy(net(images), labels))(net)
        return loss, without_moments(grads), moments_of(grads)

    @eqx.filter_jit
    def step(net, opt_state):
        loss, grads, moments = backward(net)
        params = eqx.filter(without_moments(net), eqx.is_array)
        updates, opt_state = optimizer().update(grads, opt_state, params)
        net = eqx.tree_at(moments_of, eqx.apply_updates(net, updates), moments)
        return net, opt_state, loss

    def as_layers(grads):
        return [(layer.weight.T, layer.bias) for layer in grads.layers]

    make = eqx.filter_jit(Net)
    true = as_layers(backward(make(None, jax.random.key(0)))[1])
    net, losses = make(EAGER, jax.random.key(0)), []
    measured = backward(net)[2]
    net = eqx.tree_at(moments_of, net, measured)
    modulated = as_layers(backward(net)[1])
    opt_state = optimizer().init(eqx.filter(without_moments(net), eqx.is_array))
    for _ in range(STEPS):
        net, opt_state, loss = step(net, opt_state)
        losses.append(float(loss))
    final = jnp.stack(moments_of(net))
    return Passes(true, jnp.stack(measured), modulated, losses, final, shapes_of(opt_state))


def modulated_in_haiku():
    hk = pytest.importorskip("haiku")

    def forward(x, policy):
        link = first_link()
        for index, (_, features) in enumerate(widths()):
            x = GAINS[index] * (jnp.tanh(x) if index else x)
            x = hk.Linear(features, name=f"layer_{index}")(x)
            if policy is not None:
                shape = init_state().shape
                state = hk.get_state(f"moments_{index}", shape, init=lambda *_: init_state())
                x, link = modulate(x, link, state, policy)
        # State of another kind beside it, which has no gradient.
        calls = hk.get_state("calls", (), jnp.int32, init=jnp.zeros)
        hk.set_state("calls", calls + 1)
        return x

    init, apply = hk.without_apply_rng(hk.transform_with_state(forward))

    def split(state):
        """`(moments, the rest)` of Haiku's state."""
        return hk.data_structures.partition(lambda module, name, _: "moments" in name, state)

    images, labels = digits()
    images = images.reshape(len(images), -1)

    @functools.partial(jax.jit, static_argnames="policy")
    def backward(params, state, policy=EAGER):
        moments, rest = split(state)

        def loss(params, moments):
            merged = hk.data_structures.merge(rest, moments)
            logits, new = apply(params, merged, images, policy)
            return cross_entropy(logits, labels), split(new)[1]

        grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (loss, rest), (grads, moments) = grad(params, moments)
        return loss, grads, hk.data_structures.merge(rest, moments)

    @jax.jit
    def step(params, state, opt_state):
        loss, grads, state = backward(params, state)
        updates, opt_state = optimizer().update(grads, opt_state, params)
        return optax.apply_updates(params, updates), state, opt_state, loss

    def as_layers(grads):
        layers = [grads[f"layer_{index}"] for index in range(DEPTH)]
        return [(layer["w"], layer["b"]) for layer in layers]

    def states(state):
        return jnp.stack([state["~"][f"moments_{index}"] for index in range(DEPTH)])

    params, state = jax.jit(init, static_argnums=2)(jax.random.key(0), images, EAGER)
    losses, opt_state = [], optimizer().init(params)
    true = as_layers(backward(params, state, None)[1])
    state = backward(params, state)[2]
    measured, modulated = states(state), as_layers(backward(params, state)[1])
    for _ in range(STEPS):
        params, state, opt_state, loss = step(params, state, opt_state)
        losses.append(float(loss))
    assert state["~"]["calls"] == STEPS + 1
    return Passes(true, measured, modulated, losses, states(state), shapes_of(opt_state))


def modulated_in_linen():
    class Net(nn.Module):
        policy: Policy | None

        @nn.compact
        def __call__(self, x):
            link = first_link()
            for index, (_, features) in enumerate(widths()):
                x = GAINS[index] * (jnp.tanh(x) if index else x)
                x = nn.Dense(features, name=f"layer_{index}")(x)
                if self.policy is not None:
                    x, link = Modulation(self.policy, name=f"site_{index}")(x, link)
            return x

    images, labels = digits()
    images = images.reshape(len(images), -1)

    @functools.partial(jax.jit, static_argnames="policy")
    def backward(params, moments, policy=EAGER):
        def loss(params, moments):
            variables = {"params": params, MOMENTS: moments}
            return cross_entropy(Net(policy).apply(variables, images), labels)

        return jax.value_and_grad(loss, argnums=(0, 1))(params, moments)

    @jax.jit
    def step(params, moments, opt_state):
        loss, (grads, moments) = backward(params, moments)
        updates, opt_state = optimizer().update(grads, opt_state, params)
        return optax.apply_updates(params, updates), moments, opt_state, loss

    def as_layers(grads):
        layers = [grads[f"layer_{index}"] for index in range(DEPTH)]
        return [(layer["kernel"], layer["bias"]) for layer in layers]

    def states(moments):
        return jnp.stack([moments[f"site_{index}"]["moments"] for index in range(DEPTH)])

    variables = jax.jit(Net(EAGER).init)(jax.random.key(0), images)
    params, moments = variables["params"], variables[MOMENTS]
    losses, opt_state = [], optimizer().init(params)
    true = as_layers(backward(params, moments, None)[1][0])
    moments = backward(params, moments)[1][1]
    measured, modulated = states(moments), as_layers(backward(params, moments)[1][0])
    for _ in range(STEPS):
        params, moments, opt_state, loss = step(params, moments, opt_state)
        losses.append(float(loss))
    return Passes(true, measured, modulated, losses, states(moments), shapes_of(opt_state))


MODULATED = {
    "plain JAX": modulated_in_plain_jax,
    "linen": modulated_in_linen,
    "nnx": modulated_in_nnx,
    "equinox": modulated_in_equinox,
    "haiku": modulated_in_haiku,
}


@pytest.mark.parametrize("framework", MODULATED)
def test_modulation_in_a_training_loop(framework):
    passes = MODULATED[framework]()
    moments = read(np.asarray(passes.states, np.float64))
    rho = np.append(np.sqrt(moments.handed_down[1:] / moments.second_moment[:-1]), 1)
    assert np.abs(np.log(rho[:-1])).min() > 0.01  # every pair really is rescaled

    # The modulated gradient is the true one times the scales of its own site and those above.
    for index, (true, modulated) in enumerate(zip(passes.true, passes.modulated, strict=True)):
        for expected, actual in zip(true, modulated, strict=True):
            expected = np.asarray(expected, np.float64) * rho[index:].prod()
            error = np.linalg.norm(actual - expected) / np.linalg.norm(expected)
            assert error < 1e-5, (index, error)

    # The states were overwritten in every step and no optimizer has seen them.
    np.testing.assert_array_equal(read(passes.final_states).count, np.full(DEPTH, STEPS + 1))
    assert init_state().shape not in passes.optimizer_shapes
    assert passes.losses[-1] < 0.6 * passes.losses[0]


class Dense3(nn.Module):
    """Without batch normalization, which would see the microbatch."""

    policy: Policy = EAGER

    @nn.compact
    def __call__(self, x):
        link = first_link()
        for index, features in enumerate((WIDTH, WIDTH, 10)):
            x = nn.Dense(features)(GAINS[index] * x)
            x, link = Modulation(self.policy)(x, link)
            x = jnp.tanh(x) if index < 2 else x
        return x


def test_accumulated_microbatches_train_like_the_joint_batch():
    """`optax.MultiSteps` for the parameters, the mean over microbatches for the moments.

    The error of a mean over n/k examples is k times that of a mean over n, so the second moments
    are k² times those of the joint batch at every site alike, and no scale changes.
    """
    images, labels = digits()
    images, k = images.reshape(len(images), -1), 4
    variables = jax.jit(Dense3().init)(jax.random.key(0), images)

    @jax.jit
    def backward(params, moments, images, labels):
        def loss(params, moments):
            variables = {"params": params, MOMENTS: moments}
            return cross_entropy(Dense3().apply(variables, images), labels)

        return jax.grad(loss, argnums=(0, 1))(params, moments)

    parts = list(zip(jnp.split(images, k), np.split(labels, k), strict=True))
    sgd = optax.sgd(0.1, momentum=0.9)
    # Calibrated on either kind of batch, since the scales are the same.
    joint = micro = variables["params"]
    joint_moments = backward(joint, variables[MOMENTS], images, labels)[1]
    micro_moments = jax.tree.map(
        lambda *states: sum(states) / k,
        *(backward(micro, variables[MOMENTS], *part)[1] for part in parts),
    )
    multi_steps = optax.MultiSteps(sgd, every_k_schedule=k)
    joint_state, micro_state = sgd.init(joint), multi_steps.init(micro)
    for _ in range(5):
        grads, joint_moments = backward(joint, joint_moments, images, labels)
        updates, joint_state = sgd.update(grads, joint_state, joint)
        joint = optax.apply_updates(joint, updates)

        measured = []
        for part in parts:  # all of them under the moments of the last update
            grads, moments = backward(micro, micro_moments, *part)
            measured.append(moments)
            updates, micro_state = multi_steps.update(grads, micro_state, micro)
            micro = optax.apply_updates(micro, updates)
        micro_moments = jax.tree.map(lambda *states: sum(states) / k, *measured)

    for actual, expected in zip(jax.tree.leaves(micro), jax.tree.leaves(joint), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-6)
    for name in joint_moments:
        actual, expected = (
            read(micro_moments[name]["moments"]),
            read(joint_moments[name]["moments"]),
        )
        np.testing.assert_allclose(actual.second_moment, k**2 * expected.second_moment, rtol=1e-4)
        np.testing.assert_allclose(actual.handed_down, k**2 * expected.handed_down, rtol=1e-4)
        np.testing.assert_allclose(actual.scale, expected.scale, rtol=1e-4)
        assert actual.count == expected.count == 6
