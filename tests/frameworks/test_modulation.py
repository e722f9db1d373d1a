"""The same little net, modulated by hand, in Flax NNX, Equinox, Haiku and linen.

A framework supplies parameters and a loss; the optimizer and the loop are the same for all, and the
reference is the same net without sites.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

from orthojax import init_site, modulate, modulation
from orthojax.linen import Modulated
from orthojax.sites import SITE
from orthojax.sites.modulation import find_state
from tests.frameworks.digits_batch import cross_entropy, digits

DEPTH, WIDTH, STEPS = 4, 16, 30
GAINS = (3.0, 0.5, 2.0, 0.4)  # so that the error changes size from layer to layer


class Model(NamedTuple):
    """`params` with sites, `logits(params, images)`, and `layers(tree) -> [(kernel, bias)]`."""

    params: Any
    logits: Callable[[Any, jax.Array], jax.Array]
    layers: Callable[[Any], list[tuple[jax.Array, jax.Array]]]


def widths():
    return zip([64] + [WIDTH] * (DEPTH - 1), [WIDTH] * (DEPTH - 1) + [10], strict=True)


def linen():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for index, (_, features) in enumerate(widths()):
                x = nn.Dense(features)(GAINS[index] * (jnp.tanh(x) if index else x))
            return 1.0 * x  # the last layer's output is not the net's, so that its site counts

    images, _ = digits()
    net = Modulated(Net())
    params = jax.jit(net.init)(jax.random.key(0), images.reshape(len(images), -1))["params"]
    params["Dense_3"][SITE] = init_site(3)
    return Model(
        params,
        lambda params, x: net.apply({"params": params}, x),
        lambda tree: [(tree[f"Dense_{i}"]["kernel"], tree[f"Dense_{i}"]["bias"]) for i in range(4)],
    )


def flax_nnx():
    class Layer(nnx.Module):
        def __init__(self, position, shape, rngs):
            self.linear = nnx.Linear(*shape, rngs=rngs)
            self.modulation_site = nnx.Param(init_site(position))

        def __call__(self, x):
            return modulate(self.linear(x), self.modulation_site[...])

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.stack = nnx.List([Layer(i, shape, rngs) for i, shape in enumerate(widths())])

        def __call__(self, x):
            for index, layer in enumerate(self.stack):
                x = layer(GAINS[index] * (nnx.tanh(x) if index else x))
            return x

    graph, params = nnx.split(nnx.jit(lambda: Net(nnx.Rngs(0)))())

    def layers(tree):
        linear = [tree["stack"][index]["linear"] for index in range(DEPTH)]
        return [(layer["kernel"][...], layer["bias"][...]) for layer in linear]

    return Model(params, lambda params, x: nnx.merge(graph, params)(x), layers)


def equinox():
    eqx = pytest.importorskip("equinox")

    class Layer(eqx.Module):
        linear: eqx.nn.Linear
        modulation_site: jax.Array

        def __call__(self, x):  # a batch: the moment is a mean over examples too
            return modulate(jax.vmap(self.linear)(x), self.modulation_site)

    class Net(eqx.Module):
        stack: list[Layer]

        def __call__(self, x):
            for index, layer in enumerate(self.stack):
                x = layer(GAINS[index] * (jnp.tanh(x) if index else x))
            return x

    stack = [
        Layer(eqx.nn.Linear(*shape, key=jax.random.key(index)), init_site(index))
        for index, shape in enumerate(widths())
    ]
    params, static = eqx.partition(Net(stack), eqx.is_inexact_array)

    def layers(tree):
        return [(layer.linear.weight.T, layer.linear.bias) for layer in tree.stack]

    return Model(params, lambda params, x: eqx.combine(params, static)(x), layers)


def haiku():
    hk = pytest.importorskip("haiku")

    class Layer(hk.Module):
        def __init__(self, position, features):
            super().__init__(name=f"layer_{position}")
            self.position, self.features = position, features

        def __call__(self, x):
            x = hk.Linear(self.features)(x)
            site = hk.get_parameter(SITE, (3,), init=lambda *_: init_site(self.position))
            return modulate(x, site)

    def forward(x):
        for index, (_, features) in enumerate(widths()):
            x = Layer(index, features)(GAINS[index] * (jnp.tanh(x) if index else x))
        return x

    images, _ = digits()
    net = hk.without_apply_rng(hk.transform(forward))
    params = jax.jit(net.init)(jax.random.key(0), images.reshape(len(images), -1))

    def layers(tree):
        linear = [tree[f"layer_{index}/linear"] for index in range(DEPTH)]
        return [(layer["w"], layer["b"]) for layer in linear]

    return Model(params, net.apply, layers)


@pytest.mark.parametrize("make", [linen, flax_nnx, equinox, haiku])
def test_modulation_in_a_training_loop(make):
    params, logits, layers = make()
    images, labels = digits()
    images = images.reshape(len(images), -1)
    tx = modulation(optax.adam(1e-2), tolerance=1.0)

    def loss(params):
        return cross_entropy(logits(params, images), labels)

    def reference_loss(stack):
        x = images
        for index, (kernel, bias) in enumerate(stack):
            x = GAINS[index] * (jnp.tanh(x) if index else x) @ kernel + bias
        return cross_entropy(x, labels)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value, grads

    state, losses = tx.init(params), []
    for _ in range(STEPS):
        before = params
        params, state, value, grads = step(params, state)
        losses.append(float(value))
    assert losses[-1] < 0.6 * losses[0]
    assert step._cache_size() == 1

    # Of the last step: the gradient is the true one times the scales of its site and those above.
    true = jax.jit(jax.grad(reference_loss))(layers(before))
    scales = find_state(state).scales
    rho = np.asarray([float(scales[path]) for path in sorted(scales)], np.float64)
    assert rho[-1] == 1 and np.abs(np.log(rho[:-1])).min() > 0.01
    for index, (expected, actual) in enumerate(zip(true, layers(grads), strict=True)):
        for e, a in zip(expected, actual, strict=True):
            e = np.asarray(e, np.float64) * rho[index:].prod()
            error = np.linalg.norm(a - e) / np.linalg.norm(e)
            assert error < 1e-4, (index, error)
