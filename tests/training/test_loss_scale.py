"""The loss scale: exact where it should change nothing, and what it does on overflow."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.dynamic_scale import DynamicScale

from orthojax import modulation
from orthojax.linen import Modulated
from orthojax.training.state import init_state
from orthojax.training.step import make_train_step

SHAPE = (8, 8, 1)


class Net(nn.Module):
    """Two layers, in any dtype."""

    dtype: str

    @nn.compact
    def __call__(self, x, train):
        for features in (4, 10):
            x = nn.Conv(features, (3, 3), dtype=self.dtype)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x))
        return x.mean((1, 2)).astype(np.float32)


@functools.cache
def runner(dtype):
    net = Modulated(Net(dtype))
    optimizer = modulation(optax.sgd(0.1, momentum=0.9), tolerance=1.0)
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(16, *SHAPE)), rng.integers(0, 10, 16)
    batch = {"image": images.astype(np.float32), "label": labels.astype(np.int32)}
    step = jax.jit(make_train_step(net, optimizer, lambda images, key: images, 0))
    first = jax.jit(lambda: init_state(net, optimizer, SHAPE, 0))()

    def run(loss_scale, steps):
        state = first.replace(loss_scale=jax.tree.map(jnp.asarray, loss_scale))
        history = []
        for _ in range(steps):
            state, metrics = step(state, batch)
            history.append((state, metrics))
        return history

    return run


def leaves(state):
    return [np.asarray(leaf) for leaf in jax.tree.leaves((state.params, state.batch_stats))]


def test_a_scale_of_a_power_of_two_changes_no_bit_of_modulated_training():
    """In float16 it would: errors are rounded where they are below 6e-5."""
    run = runner("float32")
    plain, scaled = run(None, 4)[-1][0], run(DynamicScale(scale=2.0**20), 4)[-1][0]
    for expected, found in zip(leaves(plain), leaves(scaled), strict=True):
        if expected.shape[-1:] != (3,):  # sites hold bounds on the scaled error
            np.testing.assert_array_equal(found, expected)


def test_a_gradient_that_overflows_halves_the_scale_and_changes_nothing_else():
    (first, metrics), (second, _) = runner("float16")(
        DynamicScale(scale=2.0**30, growth_interval=1), 2
    )
    assert metrics["loss_scale"] == 2**30 and first.loss_scale.scale == 2**29
    kept = jax.tree.leaves((first.params, first.opt_state))
    found = jax.tree.leaves((second.params, second.opt_state))
    for before, after in zip(kept, found, strict=True):
        np.testing.assert_array_equal(after, before)
    assert np.isfinite(metrics["grad_norm"]) and second.step == 2


def test_the_scale_doubles_after_an_interval_without_overflow():
    history = runner("float16")(DynamicScale(scale=8.0, growth_interval=1), 5)
    scales = [float(metrics["loss_scale"]) for _, metrics in history]
    assert scales == [8, 8, 16, 16, 32]
