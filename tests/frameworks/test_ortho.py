"""`optax_ortho` in training loops of Flax NNX, Equinox and Haiku, on the digits.

Kernels are compared as matrices `(f_in, f_out)` made here by hand.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from orthojax import (
    describe,
    optax_ortho,
    orthonormality_error,
    views,
)
from tests.frameworks.digits_batch import cross_entropy, digits

STEPS = 30
KERNELS = ("conv1", "conv2", "head")


class Trained(NamedTuple):
    """Losses of the steps, parameters, and kernels as matrices by path: first and last."""

    losses: list[float]
    params: Any
    start: dict[str, np.ndarray]
    matrices: dict[str, np.ndarray]


def output_last(kernel):
    return np.asarray(kernel, np.float64).reshape(-1, kernel.shape[-1])


def output_first(kernel):
    """Equinox's `(out, in, *window)`, the inputs in whatever order: `WᵀW` does not see it."""
    return np.asarray(kernel, np.float64).reshape(kernel.shape[0], -1).T


def train_nnx(optimizer):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv1 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
            self.conv2 = nnx.Conv(8, 8, (3, 3), strides=2, rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.head = nnx.Linear(128, 10, rngs=rngs)

        def __call__(self, x):
            x = nnx.relu(self.norm(self.conv2(nnx.relu(self.conv1(x)))))
            return self.head(x.reshape(len(x), -1))

    @nnx.jit
    def step(net, optimizer, images, labels):
        loss, grads = nnx.value_and_grad(lambda net: cross_entropy(net(images), labels))(net)
        optimizer.update(net, grads)
        return loss

    def matrices(net):
        return {f"{n}/kernel": output_last(getattr(net, n).kernel[...]) for n in KERNELS}

    net = nnx.jit(lambda: Net(nnx.Rngs(0)))()
    start = matrices(net)
    optimizer = nnx.Optimizer(net, optimizer, wrt=nnx.Param)
    losses = [float(step(net, optimizer, *digits())) for _ in range(STEPS)]
    return Trained(losses, nnx.state(net, nnx.Param), start, matrices(net))


def train_equinox(optimizer):
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        conv1: eqx.nn.Conv2d
        conv2: eqx.nn.Conv2d
        norm: eqx.nn.LayerNorm
        head: eqx.nn.Linear

        def __init__(self, key):
            keys = jax.random.split(key, 3)
            self.conv1 = eqx.nn.Conv2d(1, 8, 3, padding=1, key=keys[0])
            self.conv2 = eqx.nn.Conv2d(8, 8, 3, stride=2, padding=1, key=keys[1])
            self.norm = eqx.nn.LayerNorm((8, 4, 4))
            self.head = eqx.nn.Linear(128, 10, key=keys[2])

        def __call__(self, image):
            x = self.conv2(jax.nn.relu(self.conv1(jnp.transpose(image, (2, 0, 1)))))
            return self.head(jax.nn.relu(self.norm(x)).ravel())

    @eqx.filter_jit
    def step(net, state, images, labels):
        loss, grads = eqx.filter_value_and_grad(
            lambda net: cross_entropy(jax.vmap(net)(images), labels)
        )(net)
        updates, state = optimizer.update(grads, state, eqx.filter(net, eqx.is_array))
        return eqx.apply_updates(net, updates), state, loss

    def matrices(net):
        return {f"{n}/weight": output_first(getattr(net, n).weight) for n in KERNELS}

    net, losses = eqx.filter_jit(Net)(jax.random.key(0)), []
    start = matrices(net)
    state = optimizer.init(eqx.filter(net, eqx.is_array))
    for _ in range(STEPS):
        net, state, loss = step(net, state, *digits())
        losses.append(float(loss))
    return Trained(losses, eqx.filter(net, eqx.is_array), start, matrices(net))


def train_haiku(optimizer):
    hk = pytest.importorskip("haiku")

    def net(images):
        x = jax.nn.relu(hk.Conv2D(8, 3, name="conv1")(images))
        x = hk.LayerNorm(-1, True, True, name="norm")(hk.Conv2D(8, 3, stride=2, name="conv2")(x))
        return hk.Linear(10, name="head")(jax.nn.relu(x).reshape(len(x), -1))

    init, apply = hk.without_apply_rng(hk.transform(net))

    @jax.jit
    def step(params, state, images, labels):
        loss, grads = jax.value_and_grad(lambda p: cross_entropy(apply(p, images), labels))(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    def matrices(params):
        return {f"{n}/w": output_last(params[n]["w"]) for n in KERNELS}

    params, losses = jax.jit(init)(jax.random.key(0), digits()[0]), []
    start = matrices(params)
    state = optimizer.init(params)
    for _ in range(STEPS):
        params, state, loss = step(params, state, *digits())
        losses.append(float(loss))
    return Trained(losses, params, start, matrices(params))


ORTHO = {
    "nnx": (train_nnx, views.flax()),
    "equinox": (train_equinox, views.equinox()),
    "haiku": (train_haiku, views.haiku()),
}


def numpy_error(matrix):
    """`‖WᵀW − I‖_F / √n` of a matrix with at least as many rows as columns."""
    rows, columns = matrix.shape
    assert rows >= columns
    return np.linalg.norm(matrix.T @ matrix - np.eye(columns)) / columns**0.5


@pytest.mark.parametrize("framework", ORTHO)
def test_optax_ortho_in_a_training_loop(framework):
    train, view = ORTHO[framework]
    trained = train(optax.chain(optax_ortho(1.0, view=view), optax.sgd(0.05, momentum=0.9)))
    assert trained.losses[-1] < 0.5 * trained.losses[0]
    errors = {path: numpy_error(matrix) for path, matrix in trained.matrices.items()}
    for path, matrix in trained.start.items():
        assert errors[path] < 0.25 * numpy_error(matrix), (path, errors)

    # The view saw these kernels, as these matrices, and nothing else.
    rows = describe(trained.params, view=view).rows
    seen = {row.path: row.fan for row in rows if row.penalized}
    assert seen == {path: matrix.shape for path, matrix in trained.matrices.items()}
    assert len(rows) == 8  # three biases, a scale and an offset are left alone
    measured = orthonormality_error(trained.params, view=view)
    for path, error in errors.items():
        np.testing.assert_allclose(measured[path], error, rtol=1e-3)
