"""The optimizer of a config: schedules by their formula, and what is clipped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orthojax.errors import ConfigError
from orthojax.ortho import optax_ortho, orthonormality_error
from orthojax.training.experiment import Settings
from orthojax.training.optimizers import l2, make_optimizer

SECTIONS = {"dataset": {}, "model": {}, "modulation": None, "optimizer": {}, "schedule": {}}


def sgd(schedule="constant", **options):
    return make_optimizer(
        optimizer={"name": "sgd", "learning_rate": 0.1},
        schedule={"name": schedule, "warmup_steps": 10},
        steps=100,
        **{"regularizer": {"name": "l2", "coefficient": 0.5}, **options},
    )


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("linear", lambda step: 1 - step / 100),
        ("cosine", lambda step: (1 + np.cos(np.pi * step / 100)) / 2),
        ("constant", lambda step: 1.0),
    ],
)
def test_schedules(name, share):
    _, schedule = sgd(name)
    for step in (0, 4, 9, 10, 50, 99):
        expected = 0.1 * share(step) * min(1, (step + 1) / 10)
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", [0.5, 5.0, 50.0, None])
def test_the_gradient_is_clipped_and_the_regularizer_is_not(norm):
    params = {"kernel": jnp.asarray([[3.0]]), "bias": jnp.asarray([1.0])}
    gradient = {"kernel": jnp.asarray([[6.0]]), "bias": jnp.asarray([8.0])}  # of norm 10
    tx, schedule = sgd(clip_grad_norm=norm)
    updates, _ = tx.update(gradient, tx.init(params), params)
    share = 1.0 if norm is None else min(1.0, norm / 10)
    rate = float(schedule(0))
    np.testing.assert_allclose(updates["kernel"], [[-rate * (6 * share + 0.5 * 3)]], rtol=1e-6)
    np.testing.assert_allclose(updates["bias"], [-rate * 8 * share], rtol=1e-6)


PAGES_CHAINS = {  # of docs/optimizer.md
    "sgd": lambda penalty, rate: optax.chain(penalty, optax.sgd(rate, momentum=0.9)),
    "adam": lambda penalty, rate: optax.chain(
        optax.scale_by_adam(), penalty, optax.scale_by_learning_rate(rate)
    ),
    "rmsprop": lambda penalty, rate: optax.chain(
        optax.scale_by_rms(), penalty, optax.scale_by_learning_rate(rate)
    ),
}


@pytest.mark.parametrize("optimizer", PAGES_CHAINS)
@pytest.mark.parametrize(("regularizer", "penalty"), [("ortho", optax_ortho), ("l2", l2)])
def test_the_regularizer_stands_where_the_page_has_it(optimizer, regularizer, penalty):
    ours, schedule = make_optimizer(
        optimizer={"name": optimizer, "learning_rate": 0.01}
        | ({"momentum": 0.9} if optimizer == "sgd" else {}),
        schedule={"name": "cosine", "warmup_steps": 10},
        regularizer={"name": regularizer, "coefficient": 0.5},
        steps=100,
    )
    pages = PAGES_CHAINS[optimizer](penalty(0.5), schedule)
    start, target = jax.random.normal(jax.random.key(0), (2, 12, 4))

    @functools.partial(jax.jit, static_argnums=0)
    def trained(tx):
        def step(carry, _):
            params, state = carry
            gradient = {"kernel": 1e-3 * (params["kernel"] - target)}
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"kernel": start}
        return jax.lax.scan(step, (params, tx.init(params)), length=100)[0][0]

    found, expected = trained(ours), trained(pages)
    np.testing.assert_allclose(found["kernel"], expected["kernel"], rtol=1e-4, atol=1e-5)
    moved = np.abs(np.asarray(found["kernel"] - start)).max()
    assert moved > 0.01


def test_the_pull_of_a_penalty_is_that_of_its_coefficient_and_not_of_the_gradients_size():
    """Adam's updates have one size, whatever the loss; the penalty's are 2 λ η W (WᵀW − I)."""
    params = {"kernel": 1.1 * jnp.eye(4)}
    moved = []
    for coefficient in (0.1, 0.2):
        tx, _ = make_optimizer(
            optimizer={"name": "adam", "learning_rate": 0.1},
            schedule={"name": "constant"},
            regularizer={"name": "ortho", "coefficient": coefficient},
            steps=1,
        )
        nothing = optax.tree.zeros_like(params)
        updates, _ = tx.update(nothing, tx.init(params), params)
        moved.append(float(updates["kernel"][0, 0]))
    np.testing.assert_allclose(moved, [-0.1 * 2 * c * 1.1 * 0.21 for c in (0.1, 0.2)], rtol=1e-4)


def with_soap(rest, **options):
    return make_optimizer(
        optimizer={"name": "soap", "learning_rate": 0.01, "rest": rest, **options},
        schedule={"name": "linear", "warmup_steps": 10},
        regularizer={"name": "ortho", "coefficient": 0.5},
        steps=100,
    )


def test_soap_and_its_rest_follow_one_schedule_and_the_regularizer_the_kernels_rate():
    tx, schedule = with_soap({"name": "sgd", "learning_rate": 0.2, "momentum": 0.5})
    params = {"kernel": 2 * jnp.eye(3), "bias": jnp.ones(3)}
    gradient = {"kernel": jnp.eye(3), "bias": jnp.ones(3)}
    state, rate, velocity = tx.init(params), 0.0, 0.0
    for step in range(3):
        updates, state = tx.update(gradient, state, params)
        rate, velocity = float(schedule(step)), 1 + 0.5 * velocity
        np.testing.assert_allclose(updates["bias"], -20 * rate * velocity, rtol=1e-5)
        # A gradient that stays gives Adam's direction of 1, the penalty 2 λ W (WᵀW − I).
        expected = -rate * (1 + 2 * 0.5 * 2 * 3) * np.eye(3)
        np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        ({"name": "sgd"}, "missing from the config: `optimizer.rest.learning_rate`"),
        ({"name": "sdg", "learning_rate": 0.1}, "`optimizer.rest.name` is 'sdg'.*sgd"),
        (
            {"name": "sgd", "learning_rate": 0.1, "momentun": 0.9},
            "unknown key `optimizer.rest.momentun`.*optimizer.rest.momentum",
        ),
        (
            {"name": "sgd", "learning_rate": 0.1, "momentum": 1.5},
            "`optimizer.rest.momentum` is 1.5",
        ),
        ("sgd", "`optimizer.rest` is 'sgd'; it must be a section"),
    ],
)
def test_what_is_wrong_with_the_rest_is_named(rest, message):
    with pytest.raises(ConfigError, match=message):
        with_soap(rest)


def test_without_clipping_the_state_is_what_it_was():
    tx, _ = sgd()
    clipped, _ = sgd(clip_grad_norm=1.0)
    params = {"kernel": jnp.ones((2, 2))}
    assert len(clipped.init(params)) == len(tx.init(params)) + 1
    assert clipped.init(params)[0] == optax.EmptyState()


@pytest.mark.parametrize("method", ["polar", "qr", "pogo", "landing"])
def test_a_constraint_keeps_kernels_orthonormal_and_leaves_biases_to_the_optimizer(method):
    tx, schedule = sgd(
        regularizer={"name": "none"}, constraint={"method": method}, clip_grad_norm=1.0
    )
    kernel, gradient = jax.random.normal(jax.random.key(0), (2, 3, 3, 4, 8))
    params = {"kernel": kernel, "bias": jnp.zeros(8)}
    gradients = {"kernel": gradient, "bias": jnp.ones(8)}
    updates, _ = tx.update(gradients, tx.init(params), params)
    moved = optax.apply_updates(params, updates)
    assert orthonormality_error(moved)["kernel"] < 1e-4
    # Clipping, inside the constraint, is of the tangent gradient.
    matrix, flat = (np.asarray(a, np.float64).reshape(36, 8) for a in (kernel, gradient))
    left, _, right = np.linalg.svd(matrix, full_matrices=False)
    start = left @ right
    overlap = start.T @ flat
    norm = np.hypot(np.linalg.norm(flat - start @ (overlap + overlap.T) / 2), np.sqrt(8))
    np.testing.assert_allclose(updates["bias"], -float(schedule(0)) / norm, rtol=1e-4)


def test_a_regularizer_beside_a_constraint_is_refused():
    with pytest.raises(ConfigError, match=r"regularizer.name.*'l2'.*constraint"):
        sgd(constraint={"method": "polar"})
    with pytest.raises(ConfigError, match=r"constraint.methd.*method"):
        sgd(regularizer={"name": "none"}, constraint={"methd": "polar"})


@pytest.mark.parametrize("norm", [0.0, -1.0])
def test_an_impossible_norm_is_named(norm):
    with pytest.raises(ConfigError, match="clip_grad_norm"):
        Settings(**SECTIONS, regularizer={}, steps=1, batch_size=1, clip_grad_norm=norm)
