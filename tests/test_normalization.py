"""`BatchNorm` against Flax's, a modulation site and ReLU one after the other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from orthojax import Policy, first_link
from orthojax.linen import MOMENTS, Modulation
from orthojax.models.normalization import BatchNorm

NUMBERS = {"momentum": 0.8, "epsilon": 1e-3}
POLICIES = [None, Policy(), Policy(mode="direct"), Policy(mode="observe"), Policy(steps=1.0)]
SHAPES = [(12, 5, 3, 7), (8, 1, 1, 3), (40, 6), (4, 9, 2)]


class Composition(nn.Module):
    """What `BatchNorm` is said to equal."""

    relu: bool
    policy: Policy | None
    dtype: jnp.dtype = jnp.float32
    use_running_average: bool = False

    @nn.compact
    def __call__(self, x, link):
        if self.policy is not None:
            x, link = Modulation(self.policy, name="site")(x, link)
        norm = nn.BatchNorm(self.use_running_average, dtype=self.dtype, **NUMBERS, name="norm")
        y = norm(x)
        return jax.nn.relu(y) if self.relu else y, link


def case(shape, policy, relu, groups, dtype=jnp.float32, seed=0):
    """Both modules, their variables with the same values, an input and a weight for the loss."""
    keys = jax.random.split(jax.random.key(seed), 6)
    x = (2 * jax.random.normal(keys[0], shape) + 1).astype(dtype)
    ours = BatchNorm(False, relu, policy, groups, **NUMBERS, dtype=dtype)
    variables = ours.init(keys[1], x, first_link())
    variables["params"] = {
        "scale": jax.random.normal(keys[2], shape[-1:]),
        "bias": jax.random.normal(keys[3], shape[-1:]),
    }
    theirs = {name: {"norm": variables[name]} for name in ("params", "batch_stats")}
    if policy is not None:
        # As after some passes in which the site above handed down twice as much.
        state = jnp.array([0.25, 0.2, 0.5, 1.5, 0.1, 0.0, 3.0])
        variables[MOMENTS] = {"moments": state}
        theirs[MOMENTS] = {"site": {"moments": state}}
    weight = jax.random.normal(keys[4], shape)
    return ours, variables, Composition(relu, policy, dtype), theirs, x, weight


def outcome(module, variables, x, weight, above):
    """Result, running statistics, and the cotangents of everything, the link's as `above`."""

    def loss(variables, x, link):
        (y, link), updated = module.apply(variables, x, link, mutable=["batch_stats"])
        value = jnp.sum(weight * jnp.sin(y.astype(jnp.float32))) + above * link
        return value, (y, updated["batch_stats"])

    grads, (y, statistics) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(
        variables, x, first_link()
    )
    found = dict(y=y, statistics=jax.tree.leaves(statistics), x=grads[1], link=grads[2])
    found["params"] = jax.tree.leaves(grads[0]["params"])
    found["state"] = jax.tree.leaves(grads[0].get(MOMENTS, {}))
    return found


def assert_alike(found, expected, tolerance):
    for name, value in expected.items():
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(value), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(
                a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).max()), err_msg=name
            )


@pytest.mark.parametrize("policy", POLICIES, ids=["none", "running", "direct", "observe", "over"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_equals_site_flax_batch_norm_and_relu(policy, relu):
    for seed, shape in enumerate(SHAPES):
        ours, variables, theirs, their_variables, x, weight = case(
            shape, policy, relu, 1, seed=seed
        )
        found = outcome(ours, variables, x, weight, above=0.9)
        expected = outcome(theirs, their_variables, x, weight, above=0.9)
        assert_alike(found, expected, 2e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_bfloat16_is_float32_but_for_rounding(relu):
    low_norm, variables, _, _, x, weight = case((16, 4, 4, 5), Policy(), relu, 1, jnp.bfloat16)
    low = outcome(low_norm, variables, x, weight, above=0.9)
    high_norm = low_norm.clone(dtype=jnp.float32)
    high = outcome(high_norm, variables, x.astype(jnp.float32), weight, above=0.9)
    assert low["y"].dtype == low["x"].dtype == jnp.bfloat16
    assert_alike(low, high, 4e-2)


@pytest.mark.parametrize("policy", [None, Policy()])
def test_groups_are_normalized_each_by_itself(policy):
    """Against Flax on every part; the moments are the mean over the parts."""
    ours, variables, _, _, x, weight = case((12, 5, 5, 3), policy, True, 4)
    found = outcome(ours, variables, x, weight, above=0.9)
    single, _, _, their_variables, _, _ = case((12, 5, 5, 3), policy, True, 1)
    parts = [
        outcome(Composition(True, policy), their_variables, *part, above=0.9)
        for part in zip(jnp.split(x, 4), jnp.split(weight, 4), strict=True)
    ]
    expected = {name: np.concatenate([part[name] for part in parts]) for name in ("x", "y")}
    for name, reduce in (("statistics", np.mean), ("params", np.sum)):
        columns = zip(*(part[name] for part in parts), strict=True)
        expected[name] = [reduce(column, axis=0) for column in columns]
    assert_alike(found, expected, 2e-5)
    if policy is not None:  # the running moments are linear in what is measured
        moments = np.mean([part["state"][0][:2] for part in parts], axis=0)
        np.testing.assert_allclose(found["state"][0][:2], moments, rtol=1e-4)


def test_evaluation_uses_the_running_statistics():
    for relu, groups in itertools.product((False, True), (1, 4)):
        ours, variables, _, their_variables, x, _ = case((8, 3, 3, 5), None, relu, groups)
        statistics = {"mean": jnp.arange(5.0), "var": jnp.arange(1.0, 6.0)}
        variables["batch_stats"] = statistics
        their_variables["batch_stats"] = {"norm": statistics}
        y, link = ours.clone(use_running_average=True).apply(variables, x, first_link())
        theirs = Composition(relu, None, use_running_average=True)
        expected, _ = theirs.apply(their_variables, x, first_link())
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        assert float(link) == 0


def test_variables_are_those_of_flax():
    x = jnp.ones((2, 3, 3, 4))
    ours = BatchNorm(use_running_average=False).init(jax.random.key(0), x, first_link())
    theirs = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, dict(ours), dict(theirs))


def test_the_moment_of_an_error_that_vanishes_is_never_negative():
    """Of two values any error lies in the span of 1 and x̂, and nothing passes."""
    ours, variables, _, _, x, weight = case((2, 3), Policy(), False, 1)
    found = outcome(ours, variables, x, weight, above=0.9)
    assert np.isfinite(found["state"][0]).all() and (found["state"][0][:2] >= 0).all()


def test_a_batch_that_cannot_be_cut_is_refused():
    norm = BatchNorm(groups=4, use_running_average=False)
    with pytest.raises(ValueError, match="4 groups do not divide a batch of 10"):
        norm.init(jax.random.key(0), jnp.ones((10, 3)), first_link())
