"""`stiefel`: kernels stay on the manifold, and steps are those of Riemannian descent."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from orthojax import (
    init_site,
    modulate,
    modulation,
    orthonormality_error,
    project_orthonormal,
    scale_by_matrix_adam,
    stiefel,
    views,
)
from orthojax.errors import ConfigError
from orthojax.ortho.stiefel import METHODS
from orthojax.sites import SITE

# Tall, square, wide in groups, a convolution, a stack, and what is no kernel.
SHAPES = {
    "tall": {"kernel": (7, 3), "bias": (3,)},
    "square": {"kernel": (5, 5)},
    "wide": {"kernel": (3, 8), "bias": (8,)},
    "conv": {"kernel": (3, 3, 2, 4), "bias": (4,)},
    "scanned": {"conv": {"kernel": (3, 1, 1, 4, 4), "bias": (3, 4)}},
    "norm": {"scale": (4,), "bias": (4,)},
}
all_methods = pytest.mark.parametrize("method", METHODS)


def random_like_params(seed, dtype=jnp.float32):
    draw = np.random.default_rng(seed).normal
    return jax.tree.map(
        lambda shape: jnp.asarray(draw(size=shape) / 2, dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


@functools.cache
def start():
    return jax.jit(project_orthonormal)(random_like_params(0))


@functools.cache
def updater(method, rate=0.1, **arguments):
    tx = stiefel(optax.sgd(rate), method, **arguments)
    return tx, jax.jit(tx.update)


def step(params, gradient, method="polar", **arguments):
    tx, update = updater(method, **arguments)
    updates, _ = update(gradient, tx.init(params), params)
    return optax.apply_updates(params, updates)


def few():
    """A part of the parameters, where more of them would show nothing."""
    return {name: start()[name] for name in ("tall", "norm")}


@jax.jit
def worst(params):
    return jnp.max(jnp.stack(list(orthonormality_error(params).values())))


# What the mathematics says, of one matrix in float64.


def tangent(w, z):
    return z - w @ (w.T @ z + z.T @ w) / 2


def reference_polar(w, u):
    left, _, right = np.linalg.svd(w + u, full_matrices=False)
    return left @ right


def reference_qr(w, u):
    q, r = np.linalg.qr(w + u)
    return q * np.sign(np.diagonal(r))


def reference_pogo(w, u):
    m = w + u
    return m + 0.5 * (m - m @ m.T @ m)


def reference_landing(w, u):
    return w + u - 0.5 * w @ (w.T @ w - np.eye(w.shape[1]))


REFERENCES = {
    "polar": reference_polar,
    "qr": reference_qr,
    "pogo": reference_pogo,
    "landing": reference_landing,
}


def matrices(kernel):
    """The matrices of a kernel of `SHAPES`: layers, then column groups of at most as many rows."""
    kernel = np.asarray(kernel, np.float64)
    layers = kernel if kernel.ndim == 5 else kernel[None]
    for layer in layers:
        matrix = layer.reshape(-1, layer.shape[-1])
        for first in range(0, matrix.shape[1], matrix.shape[0]):
            yield matrix[:, first : first + matrix.shape[0]]


@all_methods
def test_one_step_is_that_of_the_reference(method):
    params, gradient = start(), random_like_params(1)
    after = step(params, gradient, method)
    count = 0
    for path, new in jax.tree_util.tree_leaves_with_path(after):
        w, g = (functools.reduce(lambda t, k: t[k.key], path, tree) for tree in (params, gradient))
        if path[-1].key != "kernel":
            chex.assert_trees_all_close(new, w - 0.1 * g)
            continue
        for old, grad, found in zip(*map(matrices, (w, g, new)), strict=True):
            expected = REFERENCES[method](old, -0.1 * tangent(old, grad))
            np.testing.assert_allclose(found, expected, atol=3e-6)
            count += 1
    assert count == 3 + 3 + 3


@all_methods
def test_rows_of_wide_kernels_without_groups(method):
    rng = np.random.default_rng(2)
    flat, params, gradient = {}, {}, {}
    for shape in ((3, 8), (2, 1, 2, 9)):
        rows, columns = int(np.prod(shape[:-1])), shape[-1]
        flat[shape] = np.linalg.qr(rng.normal(size=(columns, rows)))[0]  # Wᵀ
        name = f"rank {len(shape)}"
        params[name] = {"kernel": jnp.asarray(flat[shape].T.reshape(shape), jnp.float32)}
        gradient[name] = {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
    after = step(params, gradient, method, grouping="none")
    for shape, w in flat.items():
        g, found = (
            np.asarray(tree[f"rank {len(shape)}"]["kernel"], np.float64).reshape(w.shape[::-1]).T
            for tree in (gradient, after)
        )
        expected = REFERENCES[method](w, -0.1 * tangent(w, g))
        np.testing.assert_allclose(found, expected, atol=3e-6)


@all_methods
def test_error_of_a_thousand_steps(method):
    """Under 1e-5 in every one; of landing, under twice the square of its longest step."""
    tx = stiefel(optax.sgd(0.02, momentum=0.5), method)
    normal = np.random.default_rng(0).standard_normal
    gradients = jax.tree.map(
        lambda leaf: normal((1000, *leaf.shape), np.float32) / max(leaf.shape), start()
    )

    def body(carry, gradient):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        # The square of the Frobenius norm of a block bounds that of the spectral norm.
        longest = jnp.max(jnp.stack([jnp.sum(u**2) for u in jax.tree.leaves(updates)]))
        params = optax.apply_updates(params, updates)
        return (params, state), (worst(params), longest)

    run = jax.jit(functools.partial(jax.lax.scan, body))
    (params, _), (errors, longest) = run((start(), tx.init(start())), gradients)
    assert errors.shape == (1000,) and np.isfinite(errors).all()
    limit = 2 * float(longest.max()) if method == "landing" else 1e-5
    assert float(errors.max()) < limit
    moved = jax.tree.map(lambda a, b: np.max(np.abs(np.asarray(a) - b)), params, start())
    assert min(moved[name]["kernel"] for name in ("tall", "square", "wide", "conv")) > 0.05


# Problems whose optimum is known.


def procrustes(rng):
    """min ‖A W − B‖² over orthogonal W: the polar factor of AᵀB, which has the start's sign."""
    a, b = rng.normal(size=(2, 8, 6))
    left, singular, right = np.linalg.svd(a.T @ b)
    if np.linalg.det(left @ right) < 0:
        b[:, 0] *= -1
        left, singular, right = np.linalg.svd(a.T @ b)
    if np.linalg.det(left @ right) < 0:  # only reflecting the solution does
        left[:, -1] *= -1
        singular[-1] *= -1
    optimum = np.sum(a**2) + np.sum(b**2) - 2 * np.sum(singular)
    scale = np.linalg.norm(a, 2) ** 2
    return (
        (6, 6),
        lambda w: jnp.sum((a.astype("f4") @ w - b.astype("f4")) ** 2) / scale,
        (optimum / scale),
    )


def pca(rng):
    """max tr(WᵀCW): the sum of the largest eigenvalues."""
    half = rng.normal(size=(10, 10))
    values, vectors = np.linalg.eigh(half + half.T)
    values = np.arange(10) / 9
    c = ((vectors * values) @ vectors.T).astype("f4")
    return (10, 3), lambda w: -jnp.sum(w * (c @ w)), -np.sum(values[-3:])


def assignment(rng):
    """min tr(A W B Wᵀ), the quadratic assignment with W orthogonal instead of a permutation.

    The optimum is the smallest scalar product of the eigenvalues (Finke, Burkard and Rendl 1987).
    """
    a, b = (x + x.T for x in rng.normal(size=(2, 5, 5)) / 4)
    optimum = np.sort(np.linalg.eigvalsh(a)) @ np.sort(np.linalg.eigvalsh(b))[::-1]
    a, b = a.astype("f4"), b.astype("f4")
    return (5, 5), lambda w: jnp.sum((a @ w) * (w @ b)), optimum


@pytest.mark.parametrize(
    ("problem", "method"),
    [*((problem, "polar") for problem in (procrustes, pca, assignment)), (pca, "qr")]
    + [(procrustes, "pogo"), (assignment, "landing")],
)
def test_descent_to_the_known_optimum(problem, method):
    shape, objective, optimum = problem(np.random.default_rng(3))
    tx = stiefel(optax.sgd(0.2, momentum=0.8), method)

    def body(carry, _):
        w, state = carry
        value, gradient = jax.value_and_grad(lambda p: objective(p["kernel"]))(w)
        updates, state = tx.update(gradient, state, w)
        return (optax.apply_updates(w, updates), state), value

    q, _ = np.linalg.qr(np.random.default_rng(4).normal(size=shape))
    if shape[0] == shape[1]:
        q[:, 0] *= np.linalg.det(q)
    params = {"kernel": jnp.asarray(q, jnp.float32)}
    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=600))
    (params, _), values = run((params, tx.init(params)))
    assert values[0] > optimum + 0.1
    np.testing.assert_allclose(values[-1], optimum, atol=2e-5 * max(1, abs(optimum)))
    assert worst(params) < 1e-5


def test_gradient_and_step_are_tangent():
    params, gradient = start(), random_like_params(1)
    # `trace` remembers what `inner` was given; of `landing`, on the manifold, the step is itself.
    inner = optax.chain(optax.trace(0.0), optax.scale_by_sign(), optax.scale(-0.1))
    tx = stiefel(inner, "landing")
    updates, state = jax.jit(tx.update)(gradient, tx.init(params), params)
    (trace, *_) = state.inner_state
    for name in ("tall", "square", "wide", "conv"):
        for vectors, size in ((trace.trace, 0.3), (updates, 0.03)):
            pairs = zip(
                matrices(params[name]["kernel"]), matrices(vectors[name]["kernel"]), strict=True
            )
            for w, z in pairs:
                np.testing.assert_allclose(w.T @ z + z.T @ w, 0, atol=5e-6)
                # One column and one row have no tangent but zero.
                assert np.linalg.norm(z) > size or w.shape == (1, 1)


def test_without_gradient_projection_inner_gets_the_gradient():
    params, gradient = start(), random_like_params(1)
    inner = optax.chain(optax.trace(0.0), optax.scale(-0.1))
    tx = stiefel(inner, "pogo", project_gradient=False)
    updates, state = jax.jit(tx.update)(gradient, tx.init(params), params)
    chex.assert_trees_all_equal(state.inner_state[0].trace, gradient)
    # Of a linear optimizer without memory the step is the same.
    after = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(after, step(params, gradient, "pogo"), atol=1e-6)


@all_methods
def test_the_first_update_projects(method):
    params = random_like_params(5)
    assert worst(params) > 0.3
    zero = jax.tree.map(jnp.zeros_like, params)
    after = step(params, zero, method)
    chex.assert_trees_all_close(after, project_orthonormal(params), atol=2e-6)


@pytest.mark.parametrize("method", ["polar", "qr"])
def test_steps_of_any_length(method):
    params = start()
    for seed in range(4):
        gradient = jax.tree.map(lambda g: 200 * np.asarray(g), random_like_params(seed))
        params = step(params, gradient, method)
        assert worst(params) < 1e-5


@pytest.mark.parametrize(("method", "gradients"), [("polar", "bfloat16"), ("pogo", "float32")])
def test_bfloat16_parameters_are_rounded_orthonormal_ones(method, gradients):
    """2⁻⁹ is the largest relative error of a rounding; errors of a column's entries average."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), start())
    tx, update = updater(method)
    state = tx.init(params)
    errors = []
    for seed in range(10):
        gradient = random_like_params(seed, gradients)
        updates, state = update(gradient, state, params)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {jnp.dtype(gradients)}
        params = optax.apply_updates(params, updates)
        errors.append(float(worst(params)))
    assert {p.dtype for p in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert 1e-4 < max(errors) < 5e-3


# Among optax's other transformations.


def test_mask_leaves_kernels_to_inner():
    params, gradient = start(), random_like_params(1)
    mask = {name: name != "tall" for name in params}
    after = step(params, gradient, mask=lambda p: mask)
    chex.assert_trees_all_close(
        after["tall"], jax.tree.map(lambda p, g: p - 0.1 * g, params["tall"], gradient["tall"])
    )
    unmasked = step(params, gradient)
    chex.assert_trees_all_close(
        {k: v for k, v in after.items() if k != "tall"},
        {k: v for k, v in unmasked.items() if k != "tall"},
    )


WRAPPED = {
    "inject_hyperparams": optax.inject_hyperparams(lambda rate: stiefel(optax.sgd(rate)))(0.1),
    "apply_if_finite": optax.apply_if_finite(stiefel(optax.sgd(0.1)), 3),
    "multi_steps": optax.MultiSteps(stiefel(optax.sgd(0.1)), 2),
    "multi_transform": optax.multi_transform(
        {"kernels": stiefel(optax.sgd(0.1)), "rest": optax.sgd(0.1)},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "kernels" if path[-1].key == "kernel" else "rest", params
        ),
    ),
}


@pytest.mark.parametrize("tx", WRAPPED.values(), ids=WRAPPED)
def test_wrappers_of_optax(tx):
    params = few()
    gradient = jax.tree.map(jnp.cos, params)
    state = tx.init(params)
    update = jax.jit(tx.update)
    updates, state = update(gradient, state, params)
    if isinstance(tx, optax.MultiSteps):
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
        updates, state = update(gradient, state, params)
    after = optax.apply_updates(params, updates)
    chex.assert_trees_all_close(after, step(params, gradient), atol=1e-6)


def test_attraction_may_be_injected():
    tx = optax.inject_hyperparams(lambda a: stiefel(optax.sgd(0.1), "landing", attraction=a))(0.25)
    params = jax.tree.map(lambda x: x, few())
    params["tall"]["kernel"] = 1.01 * params["tall"]["kernel"]
    state = tx.init(params)
    inner = state.inner_state._replace(count=jnp.ones([], jnp.int32))  # after the first update
    zero = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zero, state._replace(inner_state=inner), params)
    after = optax.apply_updates(params, updates)["tall"]["kernel"]
    np.testing.assert_allclose(jnp.linalg.norm(after, axis=0), 1.005, atol=1e-4)


def test_inside_modulation():
    kernel = jnp.eye(6) + 0.1
    params = [{"kernel": kernel, SITE: init_site(n)} for n in range(3)]

    def loss(params, x):
        for layer in params:
            x = modulate(x @ layer["kernel"], layer[SITE])
        return jnp.mean((x - 1) ** 2)

    tx = modulation(stiefel(optax.sgd(0.1, momentum=0.9)))
    state = tx.init(params)
    x = jax.random.normal(jax.random.key(0), (4, 6))

    @jax.jit
    def train_step(params, state):
        value, gradient = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(20):
        params, state, value = train_step(params, state)
        losses.append(float(value))
        assert worst(params) < 1e-5
    assert losses[-1] < losses[1]


INNER = {
    "matrix_adam": optax.chain(scale_by_matrix_adam(), optax.scale_by_learning_rate(0.05)),
    "muon": optax.contrib.muon(0.05),
    "adamw": optax.adamw(0.02),
}


@pytest.mark.parametrize("inner", INNER.values(), ids=INNER)
def test_base_optimizers_descend_on_the_manifold(inner):
    rng = np.random.default_rng(6)
    target = jnp.asarray(rng.normal(size=(9, 4)), jnp.float32)
    left, _, right = np.linalg.svd(np.asarray(target, np.float64), full_matrices=False)
    params = {"kernel": jnp.eye(9, 4)}
    tx = stiefel(inner)

    def body(carry, _):
        params, state = carry
        gradient = jax.grad(lambda p: -jnp.sum(p["kernel"] * target))(params)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), worst(params)

    run = jax.jit(lambda carry: jax.lax.scan(body, carry, length=200))
    (params, _), errors = run((params, tx.init(params)))
    assert errors.max() < 1e-5
    # A constant learning rate keeps Adam and Muon at that distance from the optimum.
    assert np.linalg.norm(params["kernel"] - left @ right, 2) < 0.15


def test_the_second_call_does_not_compile():
    tx = stiefel(optax.sgd(0.1, momentum=0.9))
    update = jax.jit(chex.assert_max_traces(tx.update, 1))
    params = few()
    state = tx.init(params)
    for _ in range(2):
        updates, state = update(jax.tree.map(jnp.cos, params), state, params)
        params = optax.apply_updates(params, updates)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_parameters_stay_sharded(axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(7)
    specs = {
        "a": ((8, 16, 8), P("data", "model")),  # a stack, sharded over layers and inputs
        "b": ((3, 3, 8, 16), P(None, None, None, "model")),
        "c": ((3, 3, 8, 16), P(None, None, None, "model")),
    }
    values = {n: {"kernel": rng.normal(size=s).astype("f4") / 4} for n, (s, _) in specs.items()}
    values["a"]["bias"] = np.zeros((8, 8), "f4")
    placed = {
        name: {
            key: jax.device_put(leaf, NamedSharding(mesh, specs[name][1] if leaf.ndim > 2 else P()))
            for key, leaf in leaves.items()
        }
        for name, leaves in values.items()
    }
    tx = stiefel(optax.sgd(0.1), view=views.flax(stacked=("a",)))
    update = jax.jit(lambda p: tx.update(jax.tree.map(jnp.cos, p), tx.init(p), p)[0])
    results = [update(p) for p in (placed, values)]
    for found, expected, param in zip(*map(jax.tree.leaves, (*results, placed)), strict=True):
        assert found.sharding.is_equivalent_to(param.sharding, found.ndim)
        np.testing.assert_allclose(found, expected, atol=5e-6)


def test_parameters_that_are_none_or_masked():
    params = {"a": {"kernel": jnp.eye(3)}, "b": None, "c": optax.MaskedNode()}
    after = step(params, params)
    assert after["b"] is None and worst(after["a"]) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "cayley"}, "method='cayley'.*polar"),
        ({"attraction": 1.5}, "attraction=1.5"),
        ({"inner": 0.1}, "inner=0.1 must be an optax transformation"),
        ({"grouping": "floor"}, "grouping='floor'.*ceil"),
        ({"mask": lambda params: False}, "none of these parameters is a kernel.*masked"),
        ({"view": "flax"}, "view='flax' must be a tree"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        stiefel(**{"inner": optax.sgd(0.1), **arguments}).init({"kernel": jnp.eye(3)})


def test_without_parameters():
    tx = stiefel(optax.sgd(0.1))
    params = {"kernel": jnp.eye(3)}
    with pytest.raises(ValueError, match="not passing `params`"):
        tx.update(params, tx.init(params))
