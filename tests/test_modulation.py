"""Modulation against true gradients, float64 references, and itself in other execution modes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import orthojax
from orthojax import Policy, first_link, init_state, modulate, read

DEPTH, WIDTH, BATCH = 12, 16, 32
EAGER = Policy(tolerance=0.0, max_scale=1e6)  # rescales every pair, whatever the mismatch


def make_problem(seed=0, depth=DEPTH, dtype=jnp.float32):
    """Kernels with very different gains, so that unmodulated errors span many magnitudes."""
    keys = jax.random.split(jax.random.key(seed), 3)
    gains = 10 ** jax.random.uniform(keys[1], (depth, 1, 1), minval=-1, maxval=1)
    kernels = gains * jax.random.normal(keys[0], (depth, WIDTH, WIDTH)) / WIDTH**0.5
    return kernels.astype(dtype), jax.random.normal(keys[2], (BATCH, WIDTH)).astype(dtype)


def layer(carry, kernel, state, policy):
    x, link = carry
    x = x @ kernel
    if policy is not None:
        x, link = modulate(x, link, state, policy)
    return jnp.tanh(x / jnp.sqrt(jnp.mean(jnp.square(x), axis=0) + 1e-6)), link


def loss(kernels, states, x, policy, *, checkpoint=False):
    step = jax.checkpoint(layer) if checkpoint else layer
    carry = (x, first_link())
    for kernel, state in zip(kernels, states, strict=True):
        carry = step(carry, kernel, state, policy)
    return jnp.mean(jnp.square(carry[0] - 1).astype(jnp.float32))


@functools.partial(jax.jit, static_argnames="checkpoint")
def gradients(kernels, states, x, policy, checkpoint=False):
    def function(kernels, states):
        return loss(kernels, states, x, policy, checkpoint=checkpoint)

    return jax.grad(function, argnums=(0, 1))(kernels, states)


def reference_moments(kernels, x):
    """Second moments of the true error at each layer's output: float64, by additive probes."""
    with jax.enable_x64():
        kernels, x = np.asarray(kernels, np.float64), np.asarray(x, np.float64)

        def probed(probes):
            h = x
            for kernel, probe in zip(kernels, probes, strict=True):
                h = h @ kernel + probe
                h = jnp.tanh(h / jnp.sqrt(jnp.mean(jnp.square(h), axis=0) + 1e-6))
            return jnp.mean(jnp.square(h - 1))

        errors = jax.grad(probed)(jnp.zeros((len(kernels), *x.shape)))
        return np.asarray(jnp.mean(jnp.square(errors), axis=(1, 2)))


def measured_states(kernels, x, policy=EAGER, passes=1):
    states = init_state((len(kernels),))
    for _ in range(passes):
        states = gradients(kernels, states, x, policy)[1]
    return states


def assert_close_per_layer(actual, expected, tolerance):
    """Errors relative to each layer's own norm: entries that cancel to nothing do not count."""
    axes = tuple(range(1, np.ndim(expected)))
    norm = lambda a: np.sqrt(np.sum(np.square(np.asarray(a, np.float64)), axis=axes))  # noqa: E731
    error = norm(np.asarray(actual) - np.asarray(expected)) / norm(expected)
    assert error.max() < tolerance, error


@pytest.mark.parametrize("seed", range(3))
def test_first_pass_measures_the_true_second_moments(seed):
    kernels, x = make_problem(seed)
    moments = read(measured_states(kernels, x))
    expected = reference_moments(kernels, x)
    np.testing.assert_allclose(moments.second_moment, expected, rtol=2e-4)
    # Nothing was known before, so nothing was rescaled: what arrived was handed down.
    np.testing.assert_array_equal(moments.handed_down, moments.second_moment)
    np.testing.assert_array_equal(moments.scale, np.ones(DEPTH))


@pytest.mark.parametrize("seed", range(3))
def test_modulated_gradient_is_the_true_one_times_the_scales_above(seed):
    kernels, x = make_problem(seed)
    modulated, states = gradients(kernels, measured_states(kernels, x), x, EAGER)
    rho = read(states).scale
    expected = reference_moments(kernels, x)
    np.testing.assert_allclose(rho[:-1], np.sqrt(expected[1:] / expected[:-1]), rtol=2e-4)
    assert float(jnp.abs(jnp.log(rho[:-1])).min()) > 0.01  # every pair really is rescaled
    assert rho[-1] == 1
    true = gradients(kernels, states, x, None)[0]
    product = jnp.cumprod(rho[::-1])[::-1]  # of this site and those above
    assert_close_per_layer(modulated, true * product[:, None, None], 1e-5)


def test_neutral_policy_is_the_identity_bit_for_bit():
    kernels, x = make_problem()
    states = measured_states(kernels, x)
    true = gradients(kernels, states, x, None)[0]
    for policy in (Policy(tolerance=float("inf")), Policy(mode="observe"), Policy(steps=0.0)):
        np.testing.assert_array_equal(gradients(kernels, states, x, policy)[0], true)


def test_direct_mode_makes_every_moment_equal():
    kernels, x = make_problem()
    policy = Policy(mode="direct", tolerance=0.0, max_scale=1e6, decay=0.0)
    moments = read(measured_states(kernels, x, policy))
    top = moments.second_moment[-1]
    np.testing.assert_allclose(moments.handed_down, np.full(DEPTH, top), rtol=1e-4)


def test_running_mode_reaches_the_same_on_the_second_pass():
    kernels, x = make_problem()
    policy = Policy(tolerance=0.0, max_scale=1e6, decay=0.0)
    moments = read(measured_states(kernels, x, policy, passes=2))
    top = moments.second_moment[-1]
    np.testing.assert_allclose(moments.handed_down, np.full(DEPTH, top), rtol=1e-4)


def test_pairs_within_the_tolerance_are_left_alone():
    kernels, x = make_problem()
    states = measured_states(kernels, x)
    moments = read(states)
    ratio = moments.second_moment[1:] / moments.second_moment[:-1]
    mismatch = jnp.maximum(ratio, 1 / ratio)
    tolerance = float(jnp.sort(mismatch)[DEPTH // 2 : DEPTH // 2 + 2].mean()) - 1
    policy = Policy(tolerance=tolerance, max_scale=1e6)
    rho = read(gradients(kernels, states, x, policy)[1]).scale[:-1]
    np.testing.assert_array_equal(rho != 1, mismatch > 1 + tolerance)
    assert 0 < int((rho != 1).sum()) < DEPTH - 1
    np.testing.assert_allclose(rho[rho != 1], jnp.sqrt(ratio)[rho != 1], rtol=1e-5)


def test_scale_is_clipped():
    kernels, x = make_problem()
    rho = read(measured_states(kernels, x, Policy(tolerance=0.0, max_scale=1.5), passes=2)).scale
    np.testing.assert_allclose([rho.min(), rho.max()], [1 / 1.5, 1.5], rtol=1e-6)


def test_running_average_is_exact():
    """Against a float64 average of the moments of different batches."""
    kernels, _ = make_problem()
    batches = [make_problem(seed)[1] for seed in range(5)]
    policy = Policy(mode="observe", decay=0.6)
    states = init_state((DEPTH,))
    expected = np.zeros(DEPTH)
    for index, x in enumerate(batches):
        states = gradients(kernels, states, x, policy)[1]
        decay = min(0.6, index / (index + 1))
        expected = decay * expected + (1 - decay) * reference_moments(kernels, x)
    np.testing.assert_allclose(read(states).second_moment, expected, rtol=2e-4)
    np.testing.assert_array_equal(read(states).count, np.full(DEPTH, 5))


def test_switches_off_after_n_steps_without_recompiling():
    kernels, x = make_problem()
    compiled = jax.jit(lambda states: gradients(kernels, states, x, Policy(steps=3.0)))
    true = gradients(kernels, init_state((DEPTH,)), x, None)[0]
    states, changed = init_state((DEPTH,)), []
    for _ in range(5):
        grads, states = compiled(states)
        changed.append(not np.allclose(grads[0], true[0], rtol=1e-3))
    # Step 0 has nothing measured yet, steps 1 and 2 modulate, 3 and 4 are past the end.
    assert changed == [False, True, True, False, False]
    assert compiled._cache_size() == 1


def test_policy_numbers_may_be_traced():
    kernels, x = make_problem()
    states = measured_states(kernels, x)
    traced = jax.jit(lambda states, policy: gradients(kernels, states, x, policy)[0])
    for tolerance in (0.0, 0.5, 1e9):
        policy = Policy(tolerance=tolerance, max_scale=1e6)
        constant = jax.jit(lambda states, p=policy: gradients(kernels, states, x, p)[0])
        assert_close_per_layer(traced(states, policy), constant(states), 1e-5)
    assert traced._cache_size() == 1


def test_settled_sites_switch_off_for_good():
    kernels, x = make_problem()
    policy = Policy(decay=0.5, tolerance=0.0, settle=1e-3)
    states = init_state((DEPTH,))
    for _ in range(6):
        states = gradients(kernels, states, x, policy)[1]
    # The same batch again and again: the profile no longer changes.
    assert read(states).settled[:-1].all()
    grads, other = gradients(10 * kernels[::-1], states, x, policy)
    np.testing.assert_array_equal(read(other).scale, np.ones(DEPTH))
    assert read(other).settled[:-1].all()
    true = gradients(10 * kernels[::-1], states, x, None)[0]
    np.testing.assert_array_equal(grads, true)


def test_changing_profile_does_not_settle():
    policy = Policy(decay=0.0, settle=1e-3)
    states = init_state((DEPTH,))
    for seed in range(6):
        kernels, x = make_problem(seed)
        states = gradients(kernels, states, x, policy)[1]
    assert not read(states).settled.any()


def assert_same_moments(states, expected, rtol=1e-4):
    for name, value in read(states)._asdict().items():
        reference = getattr(read(expected), name)
        atol = 1e-5 if name in ("drift", "log_ratio") else 0  # logarithms, near zero
        np.testing.assert_allclose(value, reference, rtol=rtol, err_msg=name, atol=atol)


def scanned_gradients(kernels, states, x, policy):
    def scanned_loss(kernels, states):
        def step(carry, pair):
            return layer(carry, *pair, policy), None

        (y, _), _ = jax.lax.scan(step, (x, first_link()), (kernels, states))
        return jnp.mean(jnp.square(y - 1))

    return jax.grad(scanned_loss, argnums=(0, 1))(kernels, states)


@pytest.mark.parametrize("mode", ["running", "direct"])
@pytest.mark.parametrize("transform", ["eager", "checkpoint", "scan", "sharded"])
def test_same_moments_however_it_is_run(transform, mode):
    kernels, x = make_problem()
    policy = Policy(tolerance=0.0, max_scale=1e6, mode=mode)
    states = measured_states(kernels, x, policy)
    expected = gradients(kernels, states, x, policy)
    if transform == "eager":
        with jax.disable_jit():
            actual = gradients(kernels, states, x, policy)
    elif transform == "checkpoint":
        actual = gradients(kernels, states, x, policy, checkpoint=True)
    elif transform == "scan":
        actual = jax.jit(scanned_gradients)(kernels, states, x, policy)
    else:
        mesh = Mesh(np.asarray(jax.devices()[:8]), ("data",), axis_types=(AxisType.Auto,))
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        actual = gradients(kernels, states, split, policy)
    assert_same_moments(actual[1], expected[1])
    assert_close_per_layer(actual[0], expected[0], 1e-5)


def test_bfloat16_activations_measure_in_float32():
    kernels, x = make_problem()
    half = gradients(
        kernels.astype(jnp.bfloat16), init_state((DEPTH,)), x.astype(jnp.bfloat16), EAGER
    )
    assert half[1].dtype == jnp.float32
    # bfloat16 has 8 bits; its rounding accumulates over 12 layers.
    full = read(measured_states(kernels, x)).second_moment
    np.testing.assert_allclose(read(half[1]).second_moment, full, rtol=0.25)


def test_averaged_microbatches_give_the_state_of_the_joint_batch():
    """As accumulation averages: the running moments are linear in what was measured."""
    kernels, _ = make_problem()
    states = measured_states(kernels, make_problem(9)[1])
    parts = [gradients(kernels, states, make_problem(seed)[1], Policy())[1] for seed in range(4)]
    averaged = read(jax.tree.map(lambda *leaves: sum(leaves) / 4, *parts))
    each = [read(part).second_moment for part in parts]
    np.testing.assert_allclose(averaged.second_moment, np.mean(each, axis=0), rtol=1e-5)
    np.testing.assert_array_equal(averaged.count, read(states).count + 1)


@pytest.mark.parametrize("wrapper", ["pmap", "shard_map"])
def test_mean_over_devices_inside_pmap_and_shard_map(wrapper):
    kernels, _ = make_problem()
    x = jnp.concatenate([make_problem(seed)[1] for seed in range(8)])
    states = measured_states(kernels, x[:BATCH])

    def step(kernels, states, x):
        return jax.lax.pmean(gradients(kernels, states, x, EAGER), "devices")

    if wrapper == "pmap":
        mapped = jax.pmap(step, axis_name="devices", in_axes=(None, None, 0))
        grads, new = mapped(kernels, states, x.reshape(8, BATCH, WIDTH))
        grads, new = grads[0], new[0]
    else:
        mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
        spec = PartitionSpec
        grads, new = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(spec(), spec(), spec("devices")),
                out_specs=spec(),
                check_vma=False,
            )
        )(kernels, states, x)
    parts = [gradients(kernels, states, part, EAGER) for part in jnp.split(x, 8)]
    expected = jax.tree.map(lambda *leaves: sum(leaves) / 8, *parts)
    assert_close_per_layer(grads, expected[0], 1e-5)
    assert_same_moments(new, expected[1])


def test_a_thousand_plain_layers_do_not_overflow():
    """BN-ReLU layers multiply the squared error by 1.467 each: 1e166 over a thousand."""
    depth, width, batch = 1000, 32, 64
    kernels = jax.random.normal(jax.random.key(0), (depth, width, width)) / width**0.5
    x = jax.random.normal(jax.random.key(1), (batch, width))

    def deep_loss(kernels, states, policy):
        def step(carry, pair):
            x, link = carry
            x = x @ pair[0]
            if policy is not None:
                x, link = modulate(x, link, pair[1], policy)
            x = (x - x.mean(0)) * jax.lax.rsqrt(x.var(0) + 1e-5)
            return (jax.nn.relu(x), link), None

        (y, _), _ = jax.lax.scan(step, (x, first_link()), (kernels, states))
        return jnp.mean(jnp.square(y - 1))

    states = init_state((depth,))
    plain = jax.jit(lambda k: jax.grad(deep_loss)(k, states, None))(kernels)
    assert not jnp.isfinite(plain[0]).all()

    policy = Policy(tolerance=0.0)
    both = jax.jit(lambda k, s: jax.grad(deep_loss, argnums=(0, 1))(k, s, policy))
    states, passes = orthojax.calibrate(lambda s: both(kernels, s)[1], states)
    assert passes > 1  # one pass overflows before it reaches the bottom
    grads, _ = both(kernels, states)
    norms = jnp.linalg.norm(grads, axis=(1, 2))
    assert jnp.isfinite(grads).all()
    assert float(norms.max() / norms.min()) < 10

    direct = Policy(tolerance=0.0, mode="direct")
    grads = jax.jit(lambda k, s: jax.grad(deep_loss)(k, s, direct))(kernels, init_state((depth,)))
    assert jnp.isfinite(grads).all()


def test_moments_join_the_reductions_at_the_end_of_the_backward_pass():
    """No rho waits on a reduction: in running mode no all-reduce feeds the cotangent."""
    kernels, x = make_problem()
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec

    def count_reductions(policy):
        def step(kernels, states, x):
            return jax.lax.pmean(gradients(kernels, states, x, policy), "data")

        mapped = jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(spec(), spec(), spec("data")),
            out_specs=spec(),
            check_vma=False,
        )
        text = jax.jit(mapped).lower(kernels, init_state((DEPTH,)), x).compile().as_text()
        return text.count(" all-reduce(") + text.count(" all-reduce-start(")

    assert count_reductions(Policy()) == count_reductions(None)


def test_states_are_not_shared_with_an_optimizer():
    """A state that goes through an optimizer is destroyed; overwriting is the caller's part."""
    kernels, x = make_problem()
    states = measured_states(kernels, x)
    grads = gradients(kernels, states, x, EAGER)
    updates, _ = optax.sgd(0.1).update(grads[0], optax.sgd(0.1).init(kernels))
    assert jnp.isfinite(optax.apply_updates(kernels, updates)).all()
    assert read(grads[1]).count[0] == 2


def test_calibration_resets_the_count_and_gives_up_with_a_message():
    kernels, x = make_problem()
    states, passes = orthojax.calibrate(
        lambda s: gradients(kernels, s, x, EAGER)[1], init_state((DEPTH,))
    )
    assert passes == 1
    np.testing.assert_array_equal(read(states).count, np.zeros(DEPTH))
    np.testing.assert_allclose(read(states).second_moment, reference_moments(kernels, x), rtol=2e-4)
    with pytest.raises(FloatingPointError, match="12 modulation sites"):
        orthojax.calibrate(lambda s: gradients(0 * kernels, s, 0 * x, EAGER)[1] * 0, states)


def test_non_finite_and_vanished_errors_leave_the_state_usable():
    kernels, x = make_problem()
    states = measured_states(kernels, x)
    for factor in (0.0, float("inf")):
        new = jax.grad(lambda s, f=factor: f * loss(kernels, s, x, EAGER))(states)
        np.testing.assert_array_equal(read(new).second_moment, read(states).second_moment)
        np.testing.assert_array_equal(read(new).handed_down, read(states).handed_down)


def test_bad_arguments_are_named():
    x, link, state = jnp.ones((2, 3)), first_link(), init_state()
    with pytest.raises(TypeError, match="x is int32"):
        modulate(jnp.ones(3, jnp.int32), link, state)
    with pytest.raises(TypeError, match=r"`state`.*\(4, 7\)"):
        modulate(x, link, init_state((4,)))
    with pytest.raises(TypeError, match="`link`.*bfloat16"):
        modulate(x, link.astype(jnp.bfloat16), state)
    with pytest.raises(ValueError, match="Policy.decay is 1.0"):
        Policy(decay=1.0)
    with pytest.raises(ValueError, match="max_scale"):
        Policy(max_scale=0.5)
