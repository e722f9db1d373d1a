"""`optax_ortho` and `decoupled_ortho` among optax's other transformations."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orthojax.describe import describe
from orthojax.errors import ConfigError
from orthojax.initializers import delta_orthonormal, orthonormal
from orthojax.matrices import default_axes
from orthojax.ortho import (
    OrthoState,
    decoupled_ortho,
    mean_correlation,
    optax_ortho,
    ortho_penalty,
    orthonormality_error,
    project_orthonormal,
    views,
)


def make_params(seed=0, dtype=jnp.float32):
    draw = np.random.default_rng(seed).normal
    shapes = {
        "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
        "norm": {"scale": (4,), "bias": (4,)},
        "stage": {"scanned": {"conv": {"kernel": (3, 1, 1, 4, 4), "bias": (3, 4)}}},
        "dense": {"kernel": (4, 6), "bias": (6,)},
        "temperature": (),
    }
    return jax.tree.map(
        lambda shape: jnp.asarray(draw(size=shape) / 2, dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def penalty_gradient(params, coefficient, **arguments):
    """By autodiff of the penalty, whose value is tested against float64 elsewhere."""
    return jax.jit(jax.grad(lambda p: ortho_penalty(p, coefficient, **arguments)))(params)


def apply(transformation, updates, params):
    return jax.jit(transformation.update)(updates, transformation.init(params), params)


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


def assert_close(found, expected, atol=1e-6):
    chex.assert_trees_all_close(found, expected, rtol=1e-7, atol=atol)


def test_adds_the_penalty_gradient_to_kernels_and_nothing_to_the_rest():
    params, gradient = make_params(), make_params(1)
    updates, state = apply(optax_ortho(0.1), gradient, params)
    expected = jax.tree.map(jnp.add, gradient, penalty_gradient(params, 0.1))
    assert_close(updates, expected)
    assert state == optax.EmptyState()
    kernels = 0
    for (path, after), before in zip(
        jax.tree_util.tree_leaves_with_path(updates), jax.tree.leaves(gradient), strict=True
    ):
        touched = bool((after != before).any())
        assert touched == ("kernel" in str(path[-1])), path
        kernels += touched
    assert kernels == 3


def test_a_stack_is_its_layers_one_by_one():
    stack = make_params()["stage"]["scanned"]["conv"]["kernel"]
    found, _ = apply(
        optax_ortho(0.1), zeros({"scanned": {"kernel": stack}}), {"scanned": {"kernel": stack}}
    )
    for layer, gradient in zip(stack, found["scanned"]["kernel"], strict=True):
        matrix = np.asarray(layer, np.float64).reshape(-1, 4)
        expected = 0.2 * matrix @ (matrix.T @ matrix - np.eye(4))
        np.testing.assert_allclose(gradient.reshape(-1, 4), expected, atol=1e-6)


def test_many_kernels_at_once_are_each_alone():
    params = {
        f"layer{n}": {"kernel": jax.random.normal(jax.random.key(n), (3, 3, 4, 4)) / 6}
        for n in range(5)
    }
    params["stage"] = {"scanned": {"kernel": jnp.ones((10, 3, 3, 4, 4)) / 6}}
    params["head"] = {"kernel": jnp.ones((4, 3))}
    together, _ = apply(optax_ortho(), zeros(params), params)
    apart = {name: apply(optax_ortho(), zeros(p), p)[0] for name, p in params.items()}
    assert_close(together, apart)


def test_params_none_raises_optax_message():
    with pytest.raises(ValueError) as error:
        optax_ortho().update(make_params(), optax.EmptyState(), None)
    with pytest.raises(ValueError) as theirs:
        optax.add_decayed_weights(0.1).update(make_params(), optax.EmptyState(), None)
    assert str(error.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_dtype_is_kept_and_products_are_float32(dtype):
    params, gradient = make_params(dtype=dtype), make_params(1, dtype)
    updates, _ = apply(optax_ortho(0.1), gradient, params)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (gradient, params))
    expected = jax.tree.map(jnp.add, wide[0], penalty_gradient(wide[1], 0.1))
    for found, exact in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
        assert found.dtype == dtype
        # One rounding, of the sum.
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=eps, atol=eps / 64)


def test_mixed_dtypes_keep_the_updates_dtype():
    params = {"kernel": jnp.ones((4, 4), jnp.bfloat16)}
    updates, _ = apply(optax_ortho(0.1), {"kernel": jnp.ones((4, 4))}, params)
    assert updates["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("form", [optax_ortho, decoupled_ortho])
def test_schedules(form):
    params = make_params()
    schedule = optax.piecewise_constant_schedule(0.1, {1: 0.5, 2: 0.0})
    ortho = form(schedule)
    state, sign = ortho.init(params), 1 if form is optax_ortho else -1
    assert isinstance(state, OrthoState) and state.count.dtype == jnp.int32
    update = jax.jit(ortho.update)
    for step, value in enumerate([0.1, 0.05, 0.0]):
        assert state.count == step
        updates, state = update(zeros(params), state, params)
        expected = jax.tree.map(lambda g, v=value: sign * v * g, penalty_gradient(params, 1.0))
        assert_close(updates, expected)


def test_the_second_call_does_not_compile():
    params = make_params()
    for coefficient in (0.1, optax.cosine_decay_schedule(0.1, 10), jnp.float32(0.1)):
        ortho = optax_ortho(coefficient)
        count = 0

        @jax.jit
        def update(updates, state, params, ortho=ortho):
            nonlocal count
            count += 1
            return ortho.update(updates, state, params)

        updates, state = update(params, ortho.init(params), params)
        update(updates, state, optax.apply_updates(params, updates))
        assert count == 1


MASKS = {
    "prefix tree": {
        "conv": True,
        "norm": True,
        "stage": False,
        "dense": False,
        "temperature": True,
    },
    "function": lambda params: jax.tree_util.tree_map_with_path(
        lambda path, leaf: "conv" in str(path[0]), params
    ),
    "numpy booleans": {**dict.fromkeys(make_params(), np.False_), "conv": np.True_},
    "arrays": {**dict.fromkeys(make_params(), jnp.array(False)), "conv": np.array(True)},
    "numbers": {**dict.fromkeys(make_params(), 0), "conv": 1},
    "function to a prefix": lambda params: {name: name == "conv" for name in params},
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_masks_are_what_they_are_to_optax(mask):
    params = make_params()
    updates, _ = apply(optax_ortho(0.1, mask), zeros(params), params)
    expected = penalty_gradient(params, 0.1)
    assert_close(updates["conv"], expected["conv"])
    assert not any(leaf.any() for leaf in jax.tree.leaves((updates["dense"], updates["stage"])))
    in_optax = optax.masked(optax_ortho(0.1), mask)
    assert_close(updates, apply(in_optax, zeros(params), params)[0])


def test_a_mask_that_is_a_tree_and_can_be_called():
    eqx = pytest.importorskip("equinox")
    model = eqx.filter(eqx.nn.MLP(4, 4, 8, 2, key=jax.random.key(0)), eqx.is_array)
    first = eqx.tree_at(
        lambda mask: mask.layers[0].weight, jax.tree.map(lambda _: False, model), True
    )
    everything = jax.tree.map(lambda leaf: leaf.ndim > 1, model)
    view = views.equinox()
    full, _ = apply(optax_ortho(0.1, view=view), zeros(model), model)
    found, _ = apply(optax_ortho(0.1, everything, view=view), zeros(model), model)
    assert_close(found, full)
    found, _ = apply(optax_ortho(0.1, first, view=view), zeros(model), model)
    assert_close(found.layers[0], full.layers[0])
    assert not found.layers[1].weight.any()
    rows = {row.path: row.reason for row in describe(model, first, view=view).rows}
    assert rows["layers/0/weight"] == "" and rows["layers/1/weight"] == "masked"


@pytest.mark.parametrize("form", [optax_ortho, decoupled_ortho])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": "kernel"}, "mask='kernel' must be a tree of booleans"),
        ({"mask": True}, "mask=True must be a tree of booleans.*static_args"),
        ({"mask": {"dense": 2, "norm": True}}, "mask of parameter 'dense/bias' is 2"),
        ({"mask": {"dense": "yes", "norm": True}}, "mask of parameter 'dense/bias' is 'yes'"),
        ({"mask": {"dense": None, "norm": True}}, "mask of parameter 'dense/bias' is None"),
        ({"mask": {"dense": jnp.ones(4, bool), "norm": True}}, "mask of parameter 'dense/bias'"),
        ({"mask": {"dens": True}}, "the mask, a tree, says nothing about parameter 'dense/"),
        ({"mask": jnp.array(True)}, "mask=Array.True.*inject_hyperparams.*static_args"),
        ({"mask": lambda params: False}, "nothing to penalize.*'dense/bias' .masked"),
        ({"view": "flax"}, "view='flax' must be a tree"),
        ({"view": lambda params: None}, "nothing to penalize.*left out by the view"),
        ({"coefficient": -1e-4}, "coefficient=-0.0001"),
        ({"coefficient": float("nan")}, "coefficient=nan"),
        ({"coefficient": "1e-4"}, "coefficient='1e-4'"),
        ({"grouping": "floor"}, "grouping='floor'.*ceil"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_switch_it_off_without_a_word_is_an_error(form, arguments, message):
    params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "norm": jnp.ones(3)}
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        form(**arguments).init(params)


def test_nothing_to_penalize():
    for params in ({"bias": jnp.ones(3)}, {"w": jnp.ones((3, 3))}):
        with pytest.raises(ConfigError, match="nothing to penalize.*named.*describe.*view"):
            optax_ortho().init(params)
    with pytest.raises(ConfigError, match=r"one array.*optax\.flatten"):
        optax.flatten(optax_ortho()).init(make_params())
    # Nobody's mistake: no parameters, those of another label, a layer of width 0.
    for params in ({}, {"a": None}, {"a": optax.MaskedNode()}, {"kernel": jnp.ones((0, 3))}):
        optax_ortho().init(params)
    labels = {"dense": "a", **dict.fromkeys(set(make_params()) - {"dense"}, "b")}
    parts = {"a": optax_ortho(0.1), "b": optax.identity(), "c": optax_ortho(0.2)}
    params = make_params()
    updates, _ = apply(optax.multi_transform(parts, labels), zeros(params), params)
    assert_close(updates["dense"], penalty_gradient(params, 0.1)["dense"])


@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (3, 3, 0, 8), (3, 3, 4, 0)], ids=str)
def test_kernels_without_elements_are_left_alone(shape):
    params = {"empty": {"kernel": jnp.ones(shape)}, "full": {"kernel": 2 * jnp.eye(3)}}
    updates, _ = apply(optax_ortho(0.1), params, params)
    assert updates["empty"]["kernel"].shape == shape
    only = {"kernel": jnp.ones(shape)}
    assert apply(optax_ortho(0.1), only, only)[0]["kernel"].shape == shape
    assert ortho_penalty(only) == 0


@pytest.mark.parametrize("shape", [(64, 10007), (64, 9984), (512, 50257)])
@pytest.mark.parametrize("grouping", ["ceil", "literal"])
def test_programs_do_not_grow_with_the_kernel(shape, grouping):
    ortho = optax_ortho(1e-4, grouping=grouping)
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}
    program = jax.jit(lambda u, p: ortho.update(u, optax.EmptyState(), p)[0])
    assert len(program.lower(params, params).as_text()) < 50_000


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_without_promotion_of_ranks_and_dtypes(dtype):
    """As Flax's, Equinox's and JAX's own tests run. What is promoted is seen while tracing."""

    def everything(key):
        params = {
            "conv": {"kernel": orthonormal()(key, (3, 3, 2, 24), dtype)},
            "delta": {"kernel": delta_orthonormal()(key, (3, 3, 4, 4), dtype)},
            "depthwise": {"kernel": orthonormal(feature_groups=4)(key, (3, 3, 1, 4), dtype)},
        }
        updates, numbers = params, []
        for coefficient in (0.1, jnp.float32(0.1), optax.linear_schedule(0.0, 0.1, 3)):
            ortho = optax_ortho(coefficient)
            updates, _ = ortho.update(updates, ortho.init(params), params)
            if not callable(coefficient):
                numbers.append(ortho_penalty(params, coefficient))
        numbers.append(mean_correlation(params))
        numbers.append(orthonormality_error(params))
        methods = ("newton_schulz", "svd")
        projected = [project_orthonormal(params, method=method) for method in methods]
        return updates, projected, numbers

    with (
        jax.enable_x64(dtype == "float64"),
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
    ):
        updates, projected, numbers = jax.eval_shape(everything, jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves((updates, projected))} == {dtype}
    wide = "float64" if dtype == "float64" else "float32"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(numbers)} == {wide}


def test_views_and_masks_as_trees_inside_optax_masked_and_multi_transform():
    params = make_params()
    axes = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            default_axes(leaf.ndim, int("scanned" in str(path)))
            if "kernel" in str(path[-1])
            else None
        ),
        params,
    )
    everywhere = jax.tree.map(lambda _: True, params)
    labels = {"conv": "a", "norm": "b", "stage": "b", "dense": "a", "temperature": "b"}
    ortho = optax_ortho(0.1, view=axes, mask=everywhere)
    expected = penalty_gradient(params, 0.1)
    both = optax.multi_transform({"a": ortho, "b": optax.set_to_zero()}, labels)
    masked = optax.masked(ortho, {key: label == "a" for key, label in labels.items()})
    for transformation in (both, masked):
        updates, _ = apply(transformation, zeros(params), params)
        assert_close((updates["conv"], updates["dense"]), (expected["conv"], expected["dense"]))
        assert not updates["stage"]["scanned"]["conv"]["kernel"].any()
    full, _ = apply(ortho, zeros(params), params)
    assert_close(full, expected)


def test_none_leaves():
    params = {"a": {"kernel": jnp.ones((3, 3)), "b": None}, "c": None, "d": {"kernel": jnp.eye(3)}}
    gradient = {"a": {"kernel": None, "b": None}, "c": None, "d": {"kernel": jnp.ones((3, 3))}}
    updates, _ = apply(optax_ortho(0.1), gradient, params)
    assert updates["a"]["kernel"] is None
    np.testing.assert_allclose(updates["d"]["kernel"], 1)


def test_inject_hyperparams():
    params = make_params()
    ortho = optax.inject_hyperparams(optax_ortho)(coefficient=0.1)
    state = ortho.init(params)
    update = jax.jit(ortho.update)
    assert_close(update(zeros(params), state, params)[0], penalty_gradient(params, 0.1))
    state.hyperparams["coefficient"] = jnp.float32(0.3)
    assert_close(update(zeros(params), state, params)[0], penalty_gradient(params, 0.3))
    scheduled = optax.inject_hyperparams(optax_ortho, static_args=("mask", "view"))(
        coefficient=lambda count: 0.1 * (count + 1), mask=lambda params: True, view=views.flax()
    )
    assert_close(apply(scheduled, zeros(params), params)[0], penalty_gradient(params, 0.1))
    # A function that is not named there is called with the number of updates.
    for functions in ({"mask": lambda params: isinstance(params, dict)}, {"view": views.flax()}):
        with pytest.raises(ConfigError, match=r"static_args=\('mask', 'view'\)"):
            optax.inject_hyperparams(optax_ortho)(coefficient=0.1, **functions).init(params)


def test_init_on_shapes_and_tree_map_params():
    params = make_params()
    shapes = jax.eval_shape(lambda: params)
    for coefficient in (0.1, optax.constant_schedule(0.1)):
        ortho = optax_ortho(coefficient)
        chain = optax.chain(ortho, optax.sgd(0.1, momentum=0.9))
        assert jax.eval_shape(chain.init, shapes) == jax.eval_shape(chain.init, params)
        assert jax.tree.structure(ortho.init(shapes)) == jax.tree.structure(ortho.init(params))
        state = chain.init(params)
        doubled = optax.tree_map_params(chain, lambda x: 2 * x, state)
        assert jax.tree.structure(doubled) == jax.tree.structure(state)


def test_init_reports_what_cannot_be_read():
    params = {"video": {"kernel": jnp.ones((3, 3, 3, 4, 4))}}
    with pytest.raises(ConfigError, match=r"'video/kernel' of shape \(3, 3, 3, 4, 4\)"):
        optax_ortho().init(params)
    with pytest.raises(ConfigError, match="complex"):
        optax_ortho().init({"kernel": jnp.ones((2, 2), jnp.complex64)})
    with pytest.raises(ConfigError, match="'dense/kernel'"):
        optax_ortho(view={"conv": None}).init({"dense": {"kernel": jnp.ones((2, 2))}})


def test_multi_steps():
    params, gradients = make_params(), [make_params(1), make_params(2)]
    inner = optax.chain(optax_ortho(0.1), optax.sgd(0.5))
    steps = optax.MultiSteps(inner, every_k_schedule=2)
    state, update = steps.init(params), jax.jit(steps.update)
    first, state = update(gradients[0], state, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(first))
    second, state = update(gradients[1], state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *gradients)
    assert_close(second, apply(inner, mean, params)[0])


def test_before_the_momentum_it_is_the_gradient_of_a_penalized_loss():
    params = make_params()
    target = make_params(1)

    def loss(p):
        return sum(
            jnp.sum((a - b) ** 2) for a, b in zip(*map(jax.tree.leaves, (p, target)), strict=True)
        )

    def train(optimizer, loss):
        def step(carry, _):
            p, state = carry
            updates, state = optimizer.update(jax.grad(loss)(p), state, p)
            return (optax.apply_updates(p, updates), state), None

        return jax.jit(lambda p: jax.lax.scan(step, (p, optimizer.init(p)), None, length=10)[0][0])(
            params
        )

    sgd = optax.sgd(0.02, momentum=0.9)
    with_ortho = train(optax.chain(optax_ortho(0.1), sgd), loss)
    penalized = train(sgd, lambda p: loss(p) + ortho_penalty(p, 0.1))
    assert_close(with_ortho, penalized, atol=1e-5)


def test_decoupled_forms_leave_the_moments_alone():
    """After Adam's rescaling, the penalty is in no moment; at the end, not even times the rate."""
    params, gradient = make_params(), make_params(1)
    plain = optax.chain(optax.scale_by_adam(), optax.scale_by_learning_rate(0.01))
    between = optax.chain(
        optax.scale_by_adam(), optax_ortho(0.1), optax.scale_by_learning_rate(0.01)
    )
    last = optax.chain(optax.adam(0.01), decoupled_ortho(0.1))
    penalty = penalty_gradient(params, 0.1)
    reference, plain_state = apply(plain, gradient, params)
    for optimizer, rate in ((between, 0.01), (last, 1.0)):
        updates, state = apply(optimizer, gradient, params)
        expected = jax.tree.map(lambda u, p, r=rate: u - r * p, reference, penalty)
        assert_close(updates, expected)
        moments = state[0] if rate == 0.01 else state[0][0]
        assert_close(moments.mu, plain_state[0].mu)
        assert_close(moments.nu, plain_state[0].nu)
    coupled = optax.chain(optax_ortho(0.1), optax.scale_by_adam())
    _, state = apply(coupled, gradient, params)
    difference = state[1].mu["dense"]["kernel"] - plain_state[0].mu["dense"]["kernel"]
    np.testing.assert_allclose(difference, 0.1 * penalty["dense"]["kernel"], atol=1e-6)


def test_a_zero_coefficient_changes_nothing():
    params, gradient = make_params(), make_params(1)
    updates, _ = optax_ortho(0.0).update(gradient, optax.EmptyState(), params)
    assert updates is gradient


@pytest.mark.parametrize(("coefficient", "factor"), [(0.05, 0.8), (0.25, 0.0), (0.45, -0.8)])
def test_decoupled_rate_of_return(coefficient, factor):
    """An error ε of a singular value becomes (1 − 4λ) ε."""
    params = {"kernel": 1.001 * jnp.eye(4)}
    updates, _ = apply(decoupled_ortho(coefficient), zeros(params), params)
    after = optax.apply_updates(params, updates)["kernel"]
    np.testing.assert_allclose(jnp.diag(after) - 1, factor * 1e-3, atol=5e-6)
