"""`BatchNorm` against Flax's, a modulation site and ReLU one after the other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import AxisType, PartitionSpec

from orthojax import init_site, modulate
from orthojax.models.normalization import BatchNorm
from orthojax.sites import SITE

NUMBERS = {"momentum": 0.8, "epsilon": 1e-3}
# Bounds of the site: none, both far below the moments of these cases, both above, far apart.
SITES = [None, (0.0, 0.0), (1e-3, 2e-3), (50.0, 60.0), (1e-9, 1e9)]
SHAPES = [(12, 5, 3, 7), (8, 1, 1, 3), (40, 6), (4, 9, 2)]


class Composition(nn.Module):
    """What `BatchNorm` is said to equal."""

    relu: bool
    modulated: bool
    dtype: jnp.dtype = jnp.float32
    use_running_average: bool = False

    @nn.compact
    def __call__(self, x):
        if self.modulated:
            x = modulate(x, self.param(SITE, lambda _: init_site()))
        norm = nn.BatchNorm(self.use_running_average, dtype=self.dtype, **NUMBERS, name="norm")
        y = norm(x)
        return jax.nn.relu(y) if self.relu else y


def case(shape, bounds, relu, groups, dtype=jnp.float32, seed=0):
    """Both modules, their variables with the same values, an input and a weight for the loss."""
    keys = jax.random.split(jax.random.key(seed), 6)
    x = (2 * jax.random.normal(keys[0], shape) + 1).astype(dtype)
    modulated = bounds is not None
    ours = BatchNorm(False, relu, modulated, groups, **NUMBERS, dtype=dtype)
    variables = ours.init(keys[1], x)
    variables["params"] = {
        "scale": jax.random.normal(keys[2], shape[-1:]),
        "bias": jax.random.normal(keys[3], shape[-1:]),
    }
    theirs = {name: {"norm": variables[name]} for name in ("params", "batch_stats")}
    if modulated:
        site = jnp.asarray([*bounds, 4.0])
        variables["params"] = {**variables["params"], SITE: site}
        theirs["params"] = {**theirs["params"], SITE: site}
    weight = jax.random.normal(keys[4], shape)
    return ours, variables, Composition(relu, modulated, dtype), theirs, x, weight


def outcome(module, variables, x, weight):
    """Result, running statistics, and the cotangents of everything."""

    def loss(params, x):
        y, updated = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        value = jnp.sum(weight * jnp.sin(y.astype(jnp.float32)))
        return value, (y, updated["batch_stats"])

    grads, (y, statistics) = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
    params = dict(grads[0])
    found = dict(y=y, statistics=jax.tree.leaves(statistics), x=grads[1])
    found["site"] = params.pop(SITE, jnp.zeros(3))
    return {**found, "params": jax.tree.leaves(params)}


def assert_alike(found, expected, tolerance):
    for name, value in expected.items():
        for a, b in zip(jax.tree.leaves(found[name]), jax.tree.leaves(value), strict=True):
            a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
            np.testing.assert_allclose(
                a, b, rtol=tolerance, atol=tolerance * (1 + np.abs(b).max()), err_msg=name
            )


@pytest.mark.parametrize("bounds", SITES, ids=["none", "fresh", "below", "above", "wide"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_equals_site_flax_batch_norm_and_relu(bounds, relu):
    for seed, shape in enumerate(SHAPES):
        ours, variables, theirs, their_variables, x, weight = case(
            shape, bounds, relu, 1, seed=seed
        )
        found = outcome(ours, variables, x, weight)
        expected = outcome(theirs, their_variables, x, weight)
        assert_alike(found, expected, 2e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_bfloat16_is_float32_but_for_rounding(relu):
    low_norm, variables, _, _, x, weight = case((16, 4, 4, 5), (1e-3, 2e-3), relu, 1, jnp.bfloat16)
    low = outcome(low_norm, variables, x, weight)
    high_norm = low_norm.clone(dtype=jnp.float32)
    high = outcome(high_norm, variables, x.astype(jnp.float32), weight)
    assert low["y"].dtype == low["x"].dtype == jnp.bfloat16
    assert_alike(low, high, 4e-2)


@pytest.mark.parametrize("bounds", [None, (0.0, 0.0), (1e-3, 2e-3)])
def test_groups_are_normalized_each_by_itself(bounds):
    """Against Flax on every part; what is measured is the mean over the parts."""
    ours, variables, _, _, x, weight = case((12, 5, 5, 3), bounds, True, 4)
    found = outcome(ours, variables, x, weight)
    _, _, theirs, their_variables, _, _ = case((12, 5, 5, 3), bounds, True, 1)
    parts = [
        outcome(theirs, their_variables, *part)
        for part in zip(jnp.split(x, 4), jnp.split(weight, 4), strict=True)
    ]
    expected = {name: np.concatenate([part[name] for part in parts]) for name in ("x", "y")}
    for name, reduce in (("statistics", np.mean), ("params", np.sum)):
        columns = zip(*(part[name] for part in parts), strict=True)
        expected[name] = [reduce(column, axis=0) for column in columns]
    expected["site"] = np.mean([part["site"] for part in parts], axis=0)
    assert_alike(found, expected, 2e-5)


def test_evaluation_uses_the_running_statistics():
    for relu, groups in itertools.product((False, True), (1, 4)):
        ours, variables, _, their_variables, x, _ = case((8, 3, 3, 5), None, relu, groups)
        statistics = {"mean": jnp.arange(5.0), "var": jnp.arange(1.0, 6.0)}
        variables["batch_stats"] = statistics
        their_variables["batch_stats"] = {"norm": statistics}
        y = ours.clone(use_running_average=True).apply(variables, x)
        theirs = Composition(relu, False, use_running_average=True)
        expected = theirs.apply(their_variables, x)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_variables_are_those_of_flax():
    x = jnp.ones((2, 3, 3, 4))
    ours = BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    theirs = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, dict(ours), dict(theirs))


def test_the_moment_of_an_error_that_vanishes_is_never_negative():
    """Of two values any error lies in the span of 1 and x̂, and nothing passes."""
    ours, variables, _, _, x, weight = case((2, 3), (0.0, 0.0), False, 1)
    found = outcome(ours, variables, x, weight)
    assert np.isfinite(found["site"]).all() and found["site"][0] >= 0


def test_a_batch_that_cannot_be_cut_is_refused():
    norm = BatchNorm(groups=4, use_running_average=False)
    with pytest.raises(ValueError, match="4 groups do not divide a batch of 10"):
        norm.init(jax.random.key(0), jnp.ones((10, 3)))


def test_inference_needs_no_site():
    norm = BatchNorm(use_running_average=True, modulated=True)
    x = jnp.ones((2, 3))
    variables = BatchNorm(use_running_average=True).init(jax.random.key(0), x)
    np.testing.assert_array_equal(
        norm.apply(variables, x), norm.clone(modulated=False).apply(variables, x)
    )


def test_under_shard_map_with_its_default_checks():
    """The statistics are those of each device's share, as with groups."""
    ours, variables, _, _, x, weight = case((16, 4), (1e-3, 2e-3), True, 1)
    grouped = ours.clone(groups=8)

    def gradient(norm):
        def loss(params, x, weight):
            y = norm.apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]
            return jnp.sum(weight * jnp.sin(y))

        return jax.grad(loss)

    mapped = jax.shard_map(
        gradient(ours),
        mesh=jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,)),
        in_specs=(PartitionSpec(), PartitionSpec("devices"), PartitionSpec("devices")),
        out_specs=PartitionSpec(),
    )
    actual = mapped(variables["params"], x, weight)
    expected = gradient(grouped)(variables["params"], x, weight)
    np.testing.assert_allclose(actual["scale"], expected["scale"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(actual["bias"], expected["bias"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(actual[SITE] / 8, expected[SITE], rtol=1e-4)
