"""Modulation sites against true gradients and float64 references, and in other execution modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from orthojax import init_site, modulate
from orthojax.errors import ConfigError
from orthojax.sites import measurement

DEPTH, WIDTH, BATCH = 12, 16, 32


@jax.jit
def make_problem(seed=0):
    """Kernels with very different gains, so that unmodulated errors span many magnitudes."""
    keys = jax.random.split(jax.random.key(seed), 3)
    gains = 10 ** jax.random.uniform(keys[1], (DEPTH, 1, 1), minval=-1, maxval=1)
    kernels = gains * jax.random.normal(keys[0], (DEPTH, WIDTH, WIDTH)) / WIDTH**0.5
    return kernels, jax.random.normal(keys[2], (BATCH, WIDTH))


def fresh():
    return init_site(shape=(DEPTH,))


def bounded(low, high):
    return jnp.broadcast_to(jnp.asarray([low, high, 0], jnp.float32), (DEPTH, 3))


def layer(x, kernel, site):
    x = x @ kernel
    if site is not None:
        x = modulate(x, site)
    return jnp.tanh(x / jnp.sqrt(jnp.mean(jnp.square(x), axis=0) + 1e-6))


def loss(kernels, sites, x, *, checkpoint=False):
    step = jax.checkpoint(layer) if checkpoint else layer
    for index, kernel in enumerate(kernels):
        x = step(x, kernel, None if sites is None else sites[index])
    return jnp.mean(jnp.square(x - 1).astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="checkpoint")
def gradients(kernels, sites, x, checkpoint=False):
    def function(kernels, sites):
        return loss(kernels, sites, x, checkpoint=checkpoint)

    return jax.grad(function, argnums=(0, 1))(kernels, sites)


@jax.jit
def probe_gradients(kernels, x):
    def probed(probes):
        h = x
        for kernel, probe in zip(kernels, probes, strict=True):
            h = h @ kernel + probe
            h = jnp.tanh(h / jnp.sqrt(jnp.mean(jnp.square(h), axis=0) + 1e-6))
        return jnp.mean(jnp.square(h - 1))

    return jax.grad(probed)(jnp.zeros((len(kernels), *x.shape)))


def reference_moments(kernels, x):
    """Second moments of the true error at each layer's output: float64, by additive probes."""
    with jax.enable_x64():
        errors = probe_gradients(np.asarray(kernels, np.float64), np.asarray(x, np.float64))
    assert errors.dtype == np.float64
    return np.mean(np.square(errors), axis=(1, 2))


def reference_scales(moments, low, high):
    """The ρ of every site and the moment that arrives there, from the top down, in float64."""
    scales, arriving, product = np.ones(len(moments)), np.zeros(len(moments)), 1.0
    for index in reversed(range(len(moments))):
        arriving[index] = moments[index] * product**2
        scales[index] = np.sqrt(np.clip(arriving[index], low, high) / arriving[index])
        product *= scales[index]
    return scales, arriving


def assert_close_per_layer(actual, expected, tolerance):
    """Errors relative to each layer's own norm: entries that cancel to nothing do not count."""
    axes = tuple(range(1, np.ndim(expected)))
    norm = lambda a: np.sqrt(np.sum(np.square(np.asarray(a, np.float64)), axis=axes))  # noqa: E731
    error = norm(np.asarray(actual) - np.asarray(expected)) / norm(expected)
    assert error.max() < tolerance, error


@pytest.mark.parametrize("seed", range(3))
def test_fresh_sites_measure_the_true_second_moments_and_change_nothing(seed):
    kernels, x = make_problem(seed)
    grads, measured = gradients(kernels, fresh(), x)
    moments, weights = measurement(measured)
    np.testing.assert_allclose(moments, reference_moments(kernels, x), rtol=2e-4)
    np.testing.assert_array_equal(weights, np.ones(DEPTH))
    np.testing.assert_array_equal(measured[:, 2], np.zeros(DEPTH))  # nothing moves a position
    np.testing.assert_array_equal(grads, gradients(kernels, None, x)[0])


@pytest.mark.parametrize(("tolerance", "rescaled"), [(1.0, 11), (3.0, 6), (30.0, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_modulated_gradient_is_the_true_one_times_the_scales_above(seed, tolerance, rescaled):
    kernels, x = make_problem(seed)
    moments = reference_moments(kernels, x)
    low, high = moments[-1] / tolerance, moments[-1] * tolerance
    rho, arriving = reference_scales(moments, low, high)
    assert rescaled <= (rho != 1).sum() < DEPTH
    modulated, measured = gradients(kernels, bounded(low, high), x)
    np.testing.assert_allclose(measurement(measured)[0], arriving, rtol=1e-3)
    product = np.cumprod(rho[::-1])[::-1]  # of this site and those above
    true = np.asarray(gradients(kernels, None, x)[0], np.float64)
    assert_close_per_layer(modulated, true * product[:, None, None], 1e-4)


def test_wide_bounds_are_the_identity_bit_for_bit():
    kernels, x = make_problem()
    grads = gradients(kernels, bounded(1e-30, 1e30), x)[0]
    np.testing.assert_array_equal(grads, gradients(kernels, None, x)[0])


def test_a_site_without_an_upper_bound_is_inert():
    """As after the update of an optimizer that takes a site for a weight."""
    kernels, x = make_problem()
    sites = fresh().at[6, :2].set(-0.01)
    grads, measured = gradients(kernels, sites, x)
    np.testing.assert_array_equal(grads, gradients(kernels, None, x)[0])
    np.testing.assert_array_equal(measured, gradients(kernels, fresh(), x)[1])


def scanned_gradients(kernels, sites, x):
    def scanned_loss(kernels, sites):
        y, _ = jax.lax.scan(lambda x, pair: (layer(x, *pair), None), x, (kernels, sites))
        return jnp.mean(jnp.square(y - 1))

    return jax.grad(scanned_loss, argnums=(0, 1))(kernels, sites)


@pytest.mark.parametrize("how", ["eager", "checkpoint", "scan", "sharded"])
def test_same_however_it_is_run(how):
    kernels, x = make_problem()
    sites = bounded(1e-5, 1e-4)
    if how == "eager":
        kernels, sites = kernels[-3:], sites[-3:]
    expected = gradients(kernels, sites, x)
    if how == "eager":
        with jax.disable_jit():
            actual = gradients(kernels, sites, x)
    elif how == "checkpoint":
        actual = gradients(kernels, sites, x, checkpoint=True)
    elif how == "scan":
        actual = jax.jit(scanned_gradients)(kernels, sites, x)
    else:
        mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        actual = gradients(kernels, sites, split)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-4)
    assert_close_per_layer(actual[0], expected[0], 1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_errors_are_measured_in_float32(dtype):
    """Errors of 1e-3, whose squares float16 does not hold."""
    error = (1e-3 * jax.random.normal(jax.random.key(0), (64, 8))).astype(dtype)
    site = jnp.asarray([1e-8, 1e-8, 0.0])
    back, measured = jax.vjp(modulate, jnp.ones((64, 8), dtype), site)[1](error)
    expected = np.mean(np.square(np.asarray(error, np.float64)))
    assert measured.dtype == jnp.float32 and back.dtype == dtype
    np.testing.assert_allclose(measurement(measured), [expected, 1], rtol=1e-5)
    moment = np.mean(np.square(np.asarray(back, np.float64)))
    np.testing.assert_allclose(moment, 1e-8, rtol=2e-2)


def test_a_site_used_twice_measures_the_mean():
    kernel = jax.random.normal(jax.random.key(0), (8, 8))
    x = jax.random.normal(jax.random.key(1), (2, 4, 8))

    def shared(site):
        return sum(jnp.sum(jnp.sin(modulate(part @ kernel, site))) for part in x)

    def own(sites):
        pairs = zip(x, sites, strict=True)
        return sum(jnp.sum(jnp.sin(modulate(part @ kernel, site))) for part, site in pairs)

    total = jax.jit(jax.grad(shared))(init_site())
    each = jax.jit(jax.grad(own))(init_site(shape=(2,)))
    np.testing.assert_allclose(total, each.sum(0), rtol=1e-6)
    moment, weight = measurement(total)
    assert weight == 2
    np.testing.assert_allclose(moment, measurement(each)[0].mean(), rtol=1e-6)


@pytest.mark.parametrize("how", ["pmap", "shard_map", "shard_map unchecked"])
def test_inside_pmap_and_shard_map(how):
    """With default checks gradients of replicated values are summed already, sites' too."""
    kernels, _ = make_problem()
    x = jnp.concatenate([make_problem(seed)[1] for seed in range(8)])
    sites = bounded(1e-5, 1e-4)

    def step(kernels, sites, x):
        return gradients(kernels, sites, x)

    def averaged(kernels, sites, x):
        return jax.lax.pmean(step(kernels, sites, x), "devices")

    if how == "pmap":
        mapped = jax.pmap(averaged, axis_name="devices", in_axes=(None, None, 0))
        actual = jax.tree.map(lambda a: a[0], mapped(kernels, sites, x.reshape(8, BATCH, WIDTH)))
    else:
        checked = how == "shard_map"
        spec = PartitionSpec
        mapped = jax.shard_map(
            step if checked else averaged,
            mesh=jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,)),
            in_specs=(spec(), spec(), spec("devices")),
            out_specs=spec(),
            **({} if checked else {"check_vma": False}),
        )
        actual = jax.jit(mapped)(kernels, sites, x)
        if checked:
            np.testing.assert_array_equal(measurement(actual[1])[1], np.full(DEPTH, 8))
            actual = jax.tree.map(lambda a: a / 8, actual)
    parts = [gradients(kernels, sites, part) for part in jnp.split(x, 8)]
    expected = jax.tree.map(lambda *leaves: sum(leaves) / 8, *parts)
    assert_close_per_layer(actual[0], expected[0], 1e-5)
    np.testing.assert_allclose(actual[1], expected[1], rtol=1e-4)


@jax.jit
def scaled_site_gradients(sites, kernels, x, factor):
    return jax.grad(lambda s: factor * loss(kernels, s, x))(sites)


@pytest.mark.parametrize("factor", [0.0, float("inf"), float("nan")])
def test_a_vanished_or_overflowed_error_measures_nothing(factor):
    kernels, x = make_problem()
    measured = scaled_site_gradients(fresh(), kernels, x, factor)
    np.testing.assert_array_equal(measured, np.zeros((DEPTH, 3)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_a_thousand_plain_layers_do_not_overflow_before_the_first_bounds(dtype):
    """BN-ReLU layers multiply the squared error by 1.467 each: 1e166 over a thousand."""
    depth, width, batch = 1000, 16, 64
    kernels = jax.random.normal(jax.random.key(0), (depth, width, width)) / width**0.5
    x = jax.random.normal(jax.random.key(1), (batch, width))

    def deep_loss(kernels, sites):
        def step(x, pair):
            x = x @ pair[0].astype(dtype)
            if sites is not None:
                x = modulate(x, pair[1])
            wide = x.astype(jnp.float32)
            wide = (wide - wide.mean(0)) * jax.lax.rsqrt(wide.var(0) + 1e-5)
            return jax.nn.relu(wide).astype(dtype), None

        y, _ = jax.lax.scan(step, x.astype(dtype), (kernels, sites))
        return jnp.mean(jnp.square(y.astype(jnp.float32) - 1))

    @jax.jit
    def grad(sites):
        return jax.grad(deep_loss)(kernels, sites)

    assert not np.isfinite(grad(None)).all()
    assert np.isfinite(grad(init_site(shape=(depth,)))).all()
    if dtype == jnp.float32:
        grads = grad(jnp.broadcast_to(jnp.asarray([1e-6, 1e-6, 0]), (depth, 3)))
        norms = np.linalg.norm(grads, axis=(1, 2))
        # Of one order, up to what rounding makes of a chaotic net; without bounds 83 decades.
        assert float(norms.max() / norms.min()) < 100


def test_bad_arguments_are_named():
    x, site = jnp.ones((2, 3)), init_site()
    with pytest.raises(ConfigError, match=r"x of shape \(3,\) and dtype int32 must be a floating"):
        modulate(jnp.ones(3, jnp.int32), site)
    with pytest.raises(ConfigError, match=r"float32 \(4, 3\). Stacked sites belong to a scan"):
        modulate(x, init_site(shape=(4,)))
    with pytest.raises(ConfigError, match=r"it is float16 \(3,\)"):
        modulate(x, site.astype(jnp.float16))


@pytest.mark.parametrize(
    "optimizer",
    [
        optax.sgd(1e-2, momentum=0.9),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
        optax.lion(1e-3),
    ],
)
def test_an_optimizer_that_takes_sites_for_weights_trains_the_bare_net(optimizer):
    """Without `modulation` a site changes nothing, not even by its own share of a norm."""
    kernels, x = make_problem()
    sited, bare = (kernels, fresh()), kernels
    state, bare_state = optimizer.init(sited), optimizer.init(bare)
    for _ in range(4):
        updates, state = optimizer.update(gradients(*sited, x), state, sited)
        sited = optax.apply_updates(sited, updates)
        updates, bare_state = optimizer.update(gradients(bare, None, x)[0], bare_state, bare)
        bare = optax.apply_updates(bare, updates)
    np.testing.assert_allclose(sited[0], bare, atol=1e-5)
    assert np.abs(bare - kernels).max() > 1e-3
