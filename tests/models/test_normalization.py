"""`BatchNorm` against Flax's, a modulation site and ReLU one after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from orthojax import init_site, modulate
from orthojax.models.normalization import BatchNorm
from orthojax.sites import SITE

NUMBERS = {"momentum": 0.8, "epsilon": 1e-3}
# Bounds of the site: none, both far below the moments of these cases, both above, far apart.
SITES = [None, (0.0, 0.0), (1e-3, 2e-3), (50.0, 60.0), (1e-9, 1e9)]
SHAPES = [(12, 5, 3, 7), (40, 6)]


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


def case(shape, bounds, relu, groups=1, dtype=jnp.float32, seed=0):
    """Both modules, their variables with the same values, an input and a weight for the loss."""
    normal = np.random.default_rng(seed).standard_normal
    x, weight = (2 * normal(shape) + 1).astype(dtype), normal(shape).astype(np.float32)
    params, statistics = (
        {name: normal(shape[-1:]).astype(np.float32) for name in names}
        for names in (("scale", "bias"), ("mean", "var"))
    )
    site = {} if bounds is None else {SITE: np.float32([*bounds, 4])}
    variables = {"params": params | site, "batch_stats": statistics}
    theirs = {"params": {"norm": params} | site, "batch_stats": {"norm": statistics}}
    ours = BatchNorm(False, relu, bool(site), groups, **NUMBERS, dtype=dtype)
    return ours, variables, Composition(relu, bool(site), dtype), theirs, x, weight


@functools.partial(jax.jit, static_argnums=0)
def outcome(module, variables, x, weight):
    """Result, running statistics, and the cotangents of everything."""

    def loss(params, x):
        y, updated = module.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        value = jnp.sum(weight * jnp.sin(y.astype(jnp.float32)))
        return value, (y, updated["batch_stats"])

    grads, (y, statistics) = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
    params = dict(grads[0])
    site = params.pop(SITE, jnp.zeros(3))
    leaves = dict(statistics=jax.tree.leaves(statistics), params=jax.tree.leaves(params))
    return dict(y=y, x=grads[1], site=site, **leaves)


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
        ours, variables, theirs, their_variables, x, weight = case(shape, bounds, relu, seed=seed)
        expected = outcome(theirs, their_variables, x, weight)
        assert_alike(outcome(ours, variables, x, weight), expected, 2e-5)


def test_bfloat16_is_float32_but_for_rounding():
    low_norm, variables, _, _, x, weight = case((16, 4, 5), (1e-3, 2e-3), True, dtype=jnp.bfloat16)
    low = outcome(low_norm, variables, x, weight)
    high_norm = low_norm.clone(dtype=jnp.float32)
    high = outcome(high_norm, variables, x.astype(np.float32), weight)
    assert low["y"].dtype == low["x"].dtype == jnp.bfloat16
    assert_alike(low, high, 4e-2)


@pytest.mark.parametrize("bounds", [(0.0, 0.0), (1e-3, 2e-3)])
def test_groups_are_normalized_each_by_itself(bounds):
    """Against Flax on every part; what is measured is the mean over the parts."""
    ours, variables, theirs, their_variables, x, weight = case((12, 5, 5, 3), bounds, True, 4)
    found = outcome(ours, variables, x, weight)
    parts = [
        outcome(theirs, their_variables, *part)
        for part in zip(np.split(x, 4), np.split(weight, 4), strict=True)
    ]
    expected = {name: np.concatenate([part[name] for part in parts]) for name in ("x", "y")}
    for name, reduce in (("statistics", np.mean), ("params", np.sum)):
        columns = zip(*(part[name] for part in parts), strict=True)
        expected[name] = [reduce(column, axis=0) for column in columns]
    expected["site"] = np.mean([part["site"] for part in parts], axis=0)
    assert_alike(found, expected, 2e-5)


@pytest.mark.parametrize("relu", [False, True])
def test_evaluation_uses_the_running_statistics(relu):
    ours, variables, _, their_variables, x, _ = case((8, 3, 3, 5), None, relu, 4)
    statistics = {"mean": np.arange(5.0), "var": np.arange(1.0, 6.0)}
    y = jax.jit(ours.clone(use_running_average=True).apply)(
        {**variables, "batch_stats": statistics}, x
    )
    theirs = Composition(relu, False, use_running_average=True)
    expected = jax.jit(theirs.apply)({**their_variables, "batch_stats": {"norm": statistics}}, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_variables_are_those_of_flax():
    x = jnp.ones((2, 3, 3, 4))
    ours = BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    theirs = nn.BatchNorm(use_running_average=False).init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, dict(ours), dict(theirs))


def test_the_moment_of_an_error_that_vanishes_is_never_negative():
    """Of two values any error lies in the span of 1 and x̂, and nothing passes."""
    ours, variables, _, _, x, weight = case((2, 3), (0.0, 0.0), False)
    found = outcome(ours, variables, x, weight)
    assert np.isfinite(found["site"]).all() and found["site"][0] >= 0


def test_a_batch_that_cannot_be_cut_is_refused():
    norm = BatchNorm(groups=4, use_running_average=False)
    with pytest.raises(ValueError, match="groups=4 must be a divisor of 10"):
        norm.init(jax.random.key(0), jnp.ones((10, 3)))


def test_inference_needs_no_site():
    norm = BatchNorm(use_running_average=True, modulated=True)
    x = jnp.ones((2, 3))
    variables = BatchNorm(use_running_average=True).init(jax.random.key(0), x)
    np.testing.assert_array_equal(
        norm.apply(variables, x), norm.clone(modulated=False).apply(variables, x)
    )
