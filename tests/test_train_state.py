"""The linen module under Flax's own train state, as an observer, under remat and scan, on a mesh.

The reference is float64 NumPy and autodiff without any of this library: errors at the layers'
outputs by additive probes, running moments and scales by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.training.train_state import TrainState
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from orthojax import Policy, first_link, init_state, read
from orthojax.linen import MOMENTS, Modulation

DEPTH, WIDTH, BATCH = 5, 8, 32
GAINS = np.array([1.0, 3.0, 0.4, 2.0, 0.3])
POLICY = Policy(decay=0.6, tolerance=0.05, max_scale=2.5)
RATE, MOMENTUM = 0.05, 0.9


class Layer(nn.Module):
    """`(x, link), gain -> (x, link), None`, as `nn.scan` wants it."""

    policy: Policy | None

    @nn.compact
    def __call__(self, carry, gain):
        x, link = carry
        x = nn.Dense(WIDTH, name="dense")(gain * x)
        if self.policy is not None:
            x, link = Modulation(self.policy, name="site")(x, link)
        return (jnp.tanh(x), link), None


class Net(nn.Module):
    policy: Policy | None = POLICY
    wrap: str = "none"

    @nn.compact
    def __call__(self, x):
        carry = x, first_link()
        layer = nn.remat(Layer) if "remat" in self.wrap else Layer
        if "scan" in self.wrap:
            axes = {"params": 0, MOMENTS: 0}
            layers = nn.scan(layer, variable_axes=axes, split_rngs={"params": True}, length=DEPTH)
            return layers(self.policy, name="scanned")(carry, jnp.asarray(GAINS, x.dtype))[0][0]
        for index in range(DEPTH):
            carry, _ = layer(self.policy, name=f"layer_{index}")(carry, float(GAINS[index]))
        return carry[0]


def batch(seed):
    x = np.random.default_rng(seed).standard_normal((BATCH, WIDTH))
    return x.astype(np.float32)


def loss_of(net, variables, x):
    return jnp.mean(jnp.square(net.apply(variables, x) - 1))


@functools.cache
def initial_variables():
    return jax.jit(Net().init)(jax.random.key(0), batch(0))


def stack(variables):
    """`layer_0`, `layer_1`, ... as one, along a leading axis."""
    layers = [variables[f"layer_{index}"] for index in range(DEPTH)]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


@functools.partial(jax.jit, static_argnums=0)
def backward(net, variables, x):
    return jax.value_and_grad(functools.partial(loss_of, net))(variables, x)


# --- the reference -------------------------------------------------------------------------------


def reference_loss(kernels, biases, probes, x):
    for index in range(DEPTH):
        x = jnp.tanh(GAINS[index] * x @ kernels[index] + biases[index] + probes[index])
    return jnp.mean((x - 1) ** 2)


reference_grad = jax.jit(jax.grad(reference_loss, argnums=(0, 1, 2)))


def errors_and_gradients(kernels, biases, x):
    """Second moments of the true errors at the layers' outputs, and the true gradients: float64."""
    with jax.enable_x64():
        probes = np.zeros((DEPTH, BATCH, WIDTH))
        grads = reference_grad(kernels, biases, probes, x.astype(np.float64))
        kernel_grads, bias_grads, errors = map(np.asarray, grads)
    assert errors.dtype == np.float64
    return (errors**2).mean(axis=(1, 2)), kernel_grads, bias_grads


class Reference:
    """SGD with momentum on modulated gradients, with every step of it written out."""

    def __init__(self, params):
        stacked = stack(params)["dense"]
        self.kernels, self.biases = (np.asarray(stacked[k], np.float64) for k in ("kernel", "bias"))
        self.velocity = [np.zeros_like(self.kernels), np.zeros_like(self.biases)]
        self.below, self.above, self.count = np.zeros(DEPTH), np.zeros(DEPTH), 0

    def scales(self):
        rho = np.ones(DEPTH)
        for site in range(DEPTH - 1):
            if self.count:
                ratio = self.above[site] / self.below[site]
                if max(ratio, 1 / ratio) > 1.05:
                    rho[site] = min(max(ratio**0.5, 1 / 2.5), 2.5)
        return rho

    def step(self, x):
        rho = self.scales()
        moments, *grads = errors_and_gradients(self.kernels, self.biases, x)
        after = np.cumprod(rho[::-1])[::-1]  # of this site and those above
        arrived = moments * np.append(after[1:], 1) ** 2
        handed_down = np.append((arrived * rho**2)[1:], 0)
        decay = min(0.6, self.count / (self.count + 1))
        self.below = decay * self.below + (1 - decay) * arrived
        self.above = decay * self.above + (1 - decay) * handed_down
        self.count += 1
        grads = [grad * after.reshape(-1, *(1,) * (grad.ndim - 1)) for grad in grads]
        self.velocity = [MOMENTUM * v + g for v, g in zip(self.velocity, grads, strict=True)]
        self.kernels = self.kernels - RATE * self.velocity[0]
        self.biases = self.biases - RATE * self.velocity[1]


# --- tests ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("quick_compilation")
def test_unmodified_train_state_trains_like_a_loop_written_by_hand():
    state = TrainState.create(
        apply_fn=Net().apply, params=initial_variables(), tx=optax.sgd(RATE, momentum=MOMENTUM)
    )
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.opt_state)}
    assert init_state().shape not in shapes

    @jax.jit
    def step(state, x):
        loss, grads = jax.value_and_grad(lambda v: jnp.mean((state.apply_fn(v, x) - 1) ** 2))(
            state.params
        )
        return state.apply_gradients(grads=grads), loss

    reference, losses, rescaled = Reference(initial_variables()["params"]), [], 0
    for number in range(12):
        x = batch(number)
        rescaled += (reference.scales() != 1).sum()
        state, loss = step(state, x)
        losses.append(float(loss))
        reference.step(x)
        dense = stack(state.params["params"])["dense"]
        np.testing.assert_allclose(dense["kernel"], reference.kernels, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dense["bias"], reference.biases, rtol=1e-4, atol=1e-5)
        moments = read(stack(state.params[MOMENTS])["site"]["moments"])
        np.testing.assert_allclose(moments.second_moment, reference.below, rtol=1e-3)
        np.testing.assert_allclose(moments.handed_down[1:], reference.above[:-1], rtol=1e-3)
        np.testing.assert_array_equal(moments.count, np.full(DEPTH, number + 1))
    assert rescaled > 20
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.usefixtures("quick_compilation")
def test_observer_measures_activation_gradients_and_changes_nothing():
    observed = Net(Policy(mode="observe", decay=0.999))
    variables, plain = initial_variables(), {"params": initial_variables()["params"]}
    grads = backward(observed, variables, batch(0))[1]
    true = backward(Net(None), plain, batch(0))[1]
    jax.tree.map(np.testing.assert_array_equal, grads["params"], true["params"])

    expected = []
    for number in range(3):
        grads = backward(observed, variables, batch(number))[1]
        variables = {"params": variables["params"], MOMENTS: grads[MOMENTS]}
        dense = stack(variables["params"])["dense"]
        arrays = np.float64(dense["kernel"]), np.float64(dense["bias"])
        expected.append(errors_and_gradients(*arrays, batch(number))[0])
    # A decay this long is a plain mean over the first thousand steps.
    measured = read(stack(variables[MOMENTS])["site"]["moments"]).second_moment
    np.testing.assert_allclose(measured, np.mean(expected, axis=0), rtol=1e-5)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("mode", ["running", "direct"])
@pytest.mark.parametrize("wrap", ["remat", "scan", "remat scan"])
def test_same_moments_under_remat_and_scan(wrap, mode):
    policy = Policy(tolerance=0.0, mode=mode)
    variables = initial_variables()
    variables = {
        "params": variables["params"],
        MOMENTS: backward(Net(policy), variables, batch(0))[1][MOMENTS],
    }
    expected = {
        name: stack(tree) for name, tree in backward(Net(policy), variables, batch(1))[1].items()
    }
    if "scan" in wrap:
        stacked = {name: {"scanned": stack(tree)} for name, tree in variables.items()}
        grads = backward(Net(policy, wrap), stacked, batch(1))[1]
        actual = {name: tree["scanned"] for name, tree in grads.items()}
    else:
        grads = backward(Net(policy, wrap), variables, batch(1))[1]
        actual = {name: stack(tree) for name, tree in grads.items()}
    assert (read(expected[MOMENTS]["site"]["moments"]).count == 2).all()
    for left, right in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-7)


def test_moments_join_the_gradients_all_reduce_under_jit():
    """The compiler combines them: a modulated step on 8 devices has no all-reduce more."""
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))

    def all_reduces(policy):
        def step(variables, x):
            grads = jax.grad(functools.partial(loss_of, Net(policy)))(variables, x)
            params = jax.tree.map(lambda p, g: p - g, variables["params"], grads["params"])
            return {**grads, "params": params}

        variables = initial_variables()
        if policy is None:
            variables = {"params": variables["params"]}
        compiled = jax.jit(step, in_shardings=(whole, split), out_shardings=whole)
        text = compiled.lower(variables, batch(0)).compile().as_text()
        return text.count(" all-reduce(") + text.count(" all-reduce-start(")

    plain = all_reduces(None)
    assert plain > 0
    assert all_reduces(Policy()) == plain
    # The other mode has to wait for each moment: the count can tell.
    assert all_reduces(Policy(mode="direct")) > plain
