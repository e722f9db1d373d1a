"""`orthojax.modulation` against float64 references, and inside other people's optimizers."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import orthojax
from orthojax import init_site, modulate, modulation
from orthojax.errors import ConfigError
from orthojax.sites import SITE, measurement, rescaling, weights_only
from orthojax.sites.modulation import find_state

GAINS = (3.0, 0.2, 5.0, 0.1, 2.0)  # unequal, so that every site has something to rescale
DEPTH, WIDTH, BATCH = len(GAINS), 8, 16
INNER = optax.chain(orthojax.optax_ortho(0.01), optax.sgd(0.02, momentum=0.9))


def make_params(depth=DEPTH, sites=True):
    keys = jax.random.split(jax.random.key(0), depth)
    params = []
    for index, key in enumerate(keys):
        params.append({"kernel": jax.random.normal(key, (WIDTH, WIDTH)) / WIDTH**0.5})
        if sites:
            params[-1][SITE] = init_site(index)
    return params


def make_batch(step):
    return jax.random.normal(jax.random.key(100 + step), (BATCH, WIDTH))


def loss(params, x, scale=1.0):
    for gain, layer in zip(GAINS, params, strict=True):
        x = gain * x @ layer["kernel"]
        if SITE in layer:
            x = modulate(x, layer[SITE])
        x = jnp.tanh(x)
    return scale * jnp.mean(jnp.square(x - 1))


@jax.jit
def grad(params, x):
    return jax.grad(loss)(params, x)


def train(tx, steps=6, gradient=grad):
    """Operation by operation, so that what is equal is equal in every bit."""
    params = make_params()
    state = tx.init(params)
    for step in range(steps):
        updates, state = tx.update(gradient(params, make_batch(step)), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def alone(inner):
    """The optimizer on the weights, with sites that stay as they are: the same gradients."""
    return optax.multi_transform(
        {"weights": inner, "sites": optax.set_to_zero()},
        [{"kernel": "weights", SITE: "sites"}] * DEPTH,
    )


def measured(moment):
    """The gradient of a site at which an error of this second moment arrived."""
    return rescaling(jnp.float32(moment), init_site(), jnp.float32)[1]


def kernels(params):
    return [layer["kernel"] for layer in params]


def stacked_sites(params):
    return np.asarray([layer[SITE] for layer in params], np.float64)


def test_the_reference_is_the_running_moment_of_the_topmost_site():
    """By hand, in float64: a plain mean at first, then the decay."""
    decay, tolerance, params = 0.6, 4.0, make_params()
    tx = modulation(INNER, decay=decay, tolerance=tolerance)
    state, running, update = tx.init(params), 0.0, jax.jit(tx.update)
    for step in range(5):
        grads = grad(params, make_batch(step))
        top = float(measurement(grads[-1][SITE])[0])
        keep = min(decay, step / (step + 1))
        running = keep * running + (1 - keep) * top
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        sites = stacked_sites(params)
        np.testing.assert_allclose(sites[:-1, 0], running / tolerance, rtol=1e-5)
        np.testing.assert_allclose(sites[:-1, 1], running * tolerance, rtol=1e-5)
        np.testing.assert_array_equal(sites[-1], [0, 0, DEPTH - 1])  # the reference itself is free
        np.testing.assert_array_equal(sites[:, 2], np.arange(DEPTH))
    np.testing.assert_allclose(state.reference, running, rtol=1e-5)
    assert state.count == state.measured == 5


def test_a_constant_reference_holds_at_every_site_the_topmost_too():
    """Backward gradient normalization: all errors have one size, whatever the loss."""
    tx = modulation(INNER, tolerance=1.0, reference=0.25)
    params, _ = train(tx, 3)
    np.testing.assert_array_equal(stacked_sites(params)[:, :2], 0.25)
    _, state = tx.update(grad(params, make_batch(3)), tx.init(params), params)
    left = [s**2 * m for s, m in zip(state.scales.values(), state.moments.values(), strict=True)]
    np.testing.assert_allclose(left, 0.25, rtol=1e-5)


def test_the_state_tells_what_was_measured_and_applied():
    params, _ = train(modulation(INNER, tolerance=1.0), 3)
    tx = modulation(INNER, tolerance=1.0)
    grads = grad(params, make_batch(3))
    _, state = tx.update(grads, tx.init(params), params)
    moments = np.asarray([measurement(layer[SITE])[0] for layer in grads], np.float64)
    np.testing.assert_allclose(list(state.moments.values()), moments, rtol=1e-6)
    expected = np.sqrt(stacked_sites(params)[:-1, 0] / moments[:-1])
    np.testing.assert_allclose(list(state.scales.values())[:-1], expected, rtol=1e-5)
    assert list(state.scales.values())[-1] == 1
    # The growth that there would be without: from the moments of the bare net.
    bare = grad([{**layer, SITE: init_site(i)} for i, layer in enumerate(params)], make_batch(3))
    true = np.log([float(measurement(layer[SITE])[0]) for layer in bare])
    np.testing.assert_allclose(state.log_growth, np.abs(true - true[-1]).max(), rtol=1e-4)


def test_the_first_update_only_measures():
    """Its error met no bounds: the weights wait, and the optimizer sees a gradient of zero."""
    before = make_params()
    after, state = train(modulation(optax.sgd(0.02, momentum=0.9)), 1)
    for old, new in zip(kernels(before), kernels(after), strict=True):
        np.testing.assert_array_equal(old, new)
    assert (stacked_sites(after)[:-1, :2] > 0).all()
    assert all((trace == 0).all() for trace in jax.tree.leaves(state.inner_state))


@pytest.mark.parametrize("off", [{"tolerance": float("inf")}, {"steps": 0}, {"steps": 1}])
def test_switched_off_it_trains_like_the_optimizer_alone_bit_for_bit(off):
    params, state = train(modulation(INNER, **off))
    expected, _ = train(alone(INNER))
    for actual, wanted in zip(kernels(params), kernels(expected), strict=True):
        np.testing.assert_array_equal(actual, wanted)
    assert all(float(moment) > 0 for moment in state.moments.values())  # and it observes


def test_it_modulates_in_the_first_steps_only():
    low = [stacked_sites(train(modulation(INNER, steps=3), n)[0])[0, 0] for n in range(1, 5)]
    assert low[0] > 0 and low[1] > 0 and low[2] == low[3] == 0


def test_no_site_reaches_the_inner_optimizer():
    """Clipping by the global norm and decay see weights alone."""
    inner = optax.chain(
        optax.clip_by_global_norm(1e-3), optax.add_decayed_weights(0.1), optax.adam(1e-2)
    )
    params, state = train(modulation(inner, tolerance=float("inf")))
    expected, _ = train(alone(inner))
    for actual, wanted in zip(kernels(params), kernels(expected), strict=True):
        np.testing.assert_array_equal(actual, wanted)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.inner_state)}
    assert shapes == {(), (WIDTH, WIDTH)}


def test_a_site_that_did_not_run_keeps_what_it_knew():
    tx, (params, state) = modulation(INNER), train(modulation(INNER), 3)
    grads = grad(params, make_batch(3))
    absent = [{**g, SITE: 0 * g[SITE]} if i in (1, DEPTH - 1) else g for i, g in enumerate(grads)]
    _, after = tx.update(absent, state, params)
    for index, (old, new) in enumerate(
        zip(state.moments.values(), after.moments.values(), strict=True)
    ):
        assert (old == new) == (index in (1, DEPTH - 1))
    assert after.reference == state.reference and after.measured == state.measured


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_an_error_that_vanished_or_overflowed_leaves_the_reference_alone(value):
    tx, (params, state) = modulation(INNER), train(modulation(INNER), 3)
    grads = jax.grad(lambda p: value * loss(p, make_batch(3)))(params)
    updates, after = tx.update(grads, state, params)
    assert after.reference == state.reference
    np.testing.assert_array_equal(list(after.moments.values()), list(state.moments.values()))
    after = stacked_sites(optax.apply_updates(params, updates))
    np.testing.assert_allclose(after, stacked_sites(params), rtol=1e-6)


def scaled(factor):
    def gradient(params, x):
        grads = jax.grad(loss)(params, x, factor(params))
        return jax.tree.map(lambda g: g / factor(params), grads)

    return gradient


def test_a_constant_loss_scale_changes_nothing_bit_for_bit():
    tx = modulation(INNER, tolerance=1.0)
    expected, state = train(tx)
    actual, scaled_state = train(tx, gradient=jax.jit(scaled(lambda _: 2.0**14)))
    for one, other in zip(kernels(actual), kernels(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert scaled_state.reference == 2.0**28 * state.reference  # as it arrives


def test_a_loss_scale_that_changes_is_followed_within_a_step():
    """By Flax's DynamicScale; the sites of the next step have bounds for the new scale."""
    make_scale = pytest.importorskip("flax.training.dynamic_scale").DynamicScale
    tx, params = modulation(INNER, tolerance=1.0), make_params()
    state, dynamic, found = tx.init(params), make_scale(scale=2.0**10, growth_interval=2), []
    scaled_grad = jax.jit(lambda dynamic, params, x: dynamic.value_and_grad(loss)(params, x))
    for _ in range(8):
        dynamic, finite, _, grads = scaled_grad(dynamic, params, make_batch(0))
        assert finite
        scale = 1 / float(measurement(grads[0][SITE])[1])
        found.append((scale, float(params[0][SITE][0]) / scale**2))
        # The same parameters again and again: nothing but the scale changes.
        updates, state = tx.update(grads, state, params)
        params = [{**p, SITE: p[SITE] + u[SITE]} for p, u in zip(params, updates, strict=True)]
    assert found[-1][0] >= 4 * found[0][0]
    unscaled = float(state.reference) / found[-1][0] ** 2
    for (before, _), (scale, reference) in itertools.pairwise(found):
        expected = unscaled * (before / scale) ** 2
        np.testing.assert_allclose(reference, expected, rtol=1e-5)


def test_microbatches_by_multi_steps_train_like_the_joint_batch():
    """The loss of a microbatch is a mean of its own: errors are k times the joint batch's."""
    tx = modulation(INNER, tolerance=1.0)
    joint, state = train(tx, 3)
    accumulated = optax.MultiSteps(tx, 2)
    params, multi = make_params(), accumulated.init(make_params())
    update = jax.jit(accumulated.update)
    for step in range(6):
        half = np.split(make_batch(step // 2), 2)[step % 2]
        updates, multi = update(grad(params, half), multi, params)
        params = optax.apply_updates(params, updates)
    for actual, expected in zip(kernels(params), kernels(joint), strict=True):
        np.testing.assert_allclose(actual, expected, atol=2e-3)
    assert find_state(multi).count == state.count == 3
    np.testing.assert_allclose(find_state(multi).reference, 4 * state.reference, rtol=0.5)


def test_apply_if_finite_skips_and_goes_on():
    tx = optax.apply_if_finite(modulation(INNER), 3)
    params, update = make_params(), jax.jit(tx.update)
    state = tx.init(params)
    good = grad(params, make_batch(0))
    for gradient, count in ((good, 1), (jax.tree.map(lambda g: g * jnp.nan, good), 1), (good, 2)):
        updates, state = update(gradient, state, params)
        assert find_state(state).count == count
        assert gradient is good or not any(np.any(u) for u in jax.tree.leaves(updates))


def test_its_numbers_may_be_traced_and_injected():
    tx = optax.inject_hyperparams(modulation, static_args="inner")(inner=INNER, tolerance=1.0)
    params = make_params()
    state = tx.init(params)
    update = jax.jit(chex.assert_max_traces(tx.update, n=1))
    for tolerance in (2.0, 5.0):
        state.hyperparams["tolerance"] = jnp.float32(tolerance)
        updates, state = update(grad(params, make_batch(0)), state, params)
        sites = stacked_sites(optax.apply_updates(params, updates))
        np.testing.assert_allclose(sites[0, 1] / sites[0, 0], tolerance**2, rtol=1e-5)


def test_a_stack_of_layers_has_its_last_on_top():
    params = {"low": {SITE: init_site(0)}, "stack": {SITE: init_site(1, (4,))}}
    grads = jax.tree.map(lambda s: jax.vmap(measured)(jnp.full(s.size // 3, 7.0)), params)
    grads["low"][SITE] = grads["low"][SITE][0]
    grads["stack"][SITE] = grads["stack"][SITE].at[3].set(measured(2.0))
    tx = modulation(optax.identity(), tolerance=1.0)
    updates, state = tx.update(grads, tx.init(params), params)
    sites = optax.apply_updates(params, updates)["stack"][SITE]
    assert state.reference == 2
    np.testing.assert_array_equal(sites[:, 0], [2, 2, 2, 0])


def test_sites_at_the_output_only_measure():
    params = {"a": {SITE: init_site(0)}, "b": {SITE: init_site(1)}, "head": {SITE: init_site(-1)}}
    grads = jax.tree.map(lambda s: measured(3.0), params)
    tx = modulation(optax.identity())
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    sites = optax.apply_updates(params, updates)
    assert sites["a"][SITE][0] > 0 and (sites["head"][SITE][:2] == 0).all()
    assert float(state.moments[f"head/{SITE}"]) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tolerance": np.float32(0.5)},
            r"tolerance=np.float32.0.5. must be a number in \[1, inf\]",
        ),
        ({"decay": 1.0}, r"decay=1.0 must be a number in \[0, 1\)"),
        ({"steps": -1}, r"steps=-1 must be a number in \[0, inf\]"),
        ({"reference": 0.0}, r"reference=0.0 must be a number in \(0, inf\)"),
    ],
)
def test_bad_numbers_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        modulation(INNER, **arguments)


def test_a_model_without_sites_is_refused():
    with pytest.raises(ValueError, match="no parameter is called `modulation_site`"):
        modulation(INNER).init(make_params(sites=False))
    tx, params = modulation(INNER), make_params()
    with pytest.raises(ValueError, match="params"):
        tx.update(grad(params, make_batch(0)), tx.init(params))


def test_optax_maps_over_what_is_of_the_parameters():
    params = make_params()
    tx = modulation(optax.sgd(0.1, momentum=0.9))
    state = tx.init(params)

    def masked(leaf):
        return isinstance(leaf, optax.MaskedNode)

    def by_parameter(leaf, parameter):
        return leaf if masked(leaf) else leaf * parameter

    mapped = optax.tree_map_params(tx, by_parameter, state, params, is_leaf=masked)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    assert mapped.sites[3][SITE][2] == 9  # its position, 3, by that of the parameter
    assert mapped.count.shape == () and mapped.measured == 0


def test_state_of_shapes_alone():
    shapes = jax.eval_shape(modulation(INNER).init, jax.eval_shape(make_params))
    assert shapes.sites[0][SITE].shape == (3,)


def test_dtypes_and_structure_are_kept():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), make_params())
    tx = modulation(optax.sgd(0.1))
    grads = jax.tree.map(functools.partial(jnp.full_like, fill_value=0.1), params)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert jax.tree.map(lambda u: u.dtype, updates) == jax.tree.map(lambda p: p.dtype, params)


def test_reading_lists_the_sites_upwards_with_the_growth_between_them():
    params, _ = train(modulation(INNER, tolerance=1.0), 2)
    tx = modulation(INNER, tolerance=1.0)
    grads = grad(params, make_batch(2))
    _, state = optax.chain(tx).update(grads, optax.chain(tx).init(params), params)
    rows = orthojax.read_moments(state)
    assert [row.path for row in rows] == [str(index) for index in range(DEPTH)]
    bare = grad([{**layer, SITE: init_site(i)} for i, layer in enumerate(params)], make_batch(2))
    true = np.asarray([float(measurement(layer[SITE])[0]) for layer in bare])
    assert rows[-1].growth is None
    np.testing.assert_allclose([r.growth for r in rows[:-1]], true[:-1] / true[1:], rtol=1e-3)
    total = np.log10(true[0] / true[-1])
    assert str(rows).splitlines()[-1].endswith(f"by 10^{total:.1f} on its way down")
    with pytest.raises(ValueError, match="no state of orthojax.modulation"):
        orthojax.read_moments(optax.sgd(0.1).init(params))


@pytest.mark.parametrize("positions", [range(13), [0.0] * 13], ids=["numbered", "as they come"])
def test_reading_tells_layers_apart_in_lists_longer_than_ten(positions):
    """JAX hands dictionaries back sorted by string, where "10" comes before "2"."""
    gains = np.linspace(0.4, 1.6, 13)
    layers = [{"kernel": jnp.eye(4), SITE: init_site(k)} for k in positions]
    tx = modulation(optax.sgd(0.0), tolerance=float("inf"))

    def loss(layers):
        x = jnp.ones((2, 4))
        for gain, layer in zip(gains, layers, strict=True):
            x = modulate(gain * x @ layer["kernel"], layer[SITE])
        return jnp.mean((x - 1) ** 2)

    @jax.jit
    def step(state):
        return tx.update(jax.grad(loss)(layers), state, layers)[1]

    rows = orthojax.read_moments(step(step(tx.init(layers))))
    assert [row.path for row in rows] == [str(k) for k in range(13)]
    growth = [row.growth for row in rows]
    np.testing.assert_allclose(growth[:-1], gains[1:] ** 2, rtol=1e-3)
    assert growth[-1] is None


def test_state_and_updates_are_matched_by_path():
    """What comes back in another order, or is not all there, is no other layer's."""
    params = {str(k): {SITE: init_site(k)} for k in range(3)}
    tx = modulation(optax.identity())
    grads = {name: {SITE: measured(2.0 ** int(name))} for name in ("2", "0", "1")}
    _, state = tx.update(grads, tx.init(params), params)
    assert [row.moment for row in orthojax.read_moments(state)] == [1, 2, 4]
    with pytest.raises(ConfigError, match=f"nothing for parameter '1/{SITE}' in updates"):
        tx.update({**grads, "1": {SITE: optax.MaskedNode()}}, state, params)


def test_no_norm_sees_a_site():
    """Clipping outside is clipping inside, and a logged norm is that of the weights."""
    params = make_params()
    grads = grad(params, make_batch(0))
    assert optax.tree.norm(grads) == optax.tree.norm(weights_only(grads))
    clip = optax.clip_by_global_norm(0.1)
    outside, _ = train(optax.chain(clip, modulation(INNER, tolerance=1.0)))
    inside, _ = train(modulation(optax.chain(clip, INNER), tolerance=1.0))
    for actual, expected in zip(kernels(outside), kernels(inside), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert np.abs(kernels(inside)[0] - kernels(params)[0]).max() > 1e-3


def test_what_changes_the_bounds_behind_modulation_shows_in_the_readings():
    tx = optax.chain(modulation(optax.identity()), optax.scale(-0.1))  # the wrong way round
    _, state = train(tx, 3)
    scales = [row.scale for row in orthojax.read_moments(state)]
    assert np.isnan(scales[:-1]).all() and scales[-1] == 1


def test_reading_a_stack_and_outputs():
    params = {
        "head": {SITE: init_site(-1)},
        "stack": {SITE: init_site(1, (2,))},
        "attention": {"value": {SITE: init_site(0)}},
    }
    rows = orthojax.read_moments(modulation(optax.identity()).init(params))
    assert [row.path for row in rows] == ["attention/value", "stack[0]", "stack[1]", "head"]
