"""The preconditioner, against a float64 reference, and what it promises in others' loops."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import orthojax
from orthojax import scale_by_soap, soap, stiefel, views
from orthojax.errors import ConfigError
from orthojax.matrices import KernelAxes
from orthojax.ortho import SoapState

DECAYS = {"b1": 0.9, "b2": 0.8, "factor_decay": 0.7}


def run(tx, gradients, params):
    """Every update, and the last state."""
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        found.append(updates)
    return found, state


def draw(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def like(params, seed):
    return jax.tree.map(lambda p: jnp.asarray(draw(seed, *p.shape), p.dtype), params)


def along(array, matrix, side):
    """A matrix times every vector along a side."""
    return np.moveaxis(np.tensordot(matrix, array, (1, side)), 0, side)


def rotate(array, matrices):
    for side, matrix in enumerate(matrices):
        array = along(array, matrix, side)
    return array


def unfolded(array, side):
    return np.moveaxis(array, side, 0).reshape(array.shape[side], -1)


class Reference:
    """One kernel `(*sides)`, in float64, by the equations of Vyas et al. and of the docstring."""

    def __init__(self, shape, b1, b2, factor_decay):
        self.b1, self.b2, self.decay, self.count = b1, b2, factor_decay, 0
        self.mu, self.nu = np.zeros(shape), np.zeros(shape)
        self.factors = [np.zeros((n, n)) for n in shape]

    def update(self, gradient, refresh):
        """`refresh` is "eigh", or whether the bases take a step of orthogonal iteration."""
        for side, factor in enumerate(self.factors):
            rows = unfolded(gradient, side)
            self.factors[side] = self.decay * factor + (1 - self.decay) * rows @ rows.T
        if refresh == "eigh" or self.count == 0:
            self.bases = [np.linalg.eigh(factor)[1] for factor in self.factors]
        elif refresh:
            old = self.bases
            self.bases = [self.iterate(*pair) for pair in zip(self.factors, old, strict=True)]
            change = [new.T @ was for new, was in zip(self.bases, old, strict=True)]
            self.mu = rotate(self.mu, change)
            self.nu = rotate(self.nu, [matrix**2 for matrix in change])
        self.count += 1
        rotated = rotate(gradient, [basis.T for basis in self.bases])
        self.mu = self.b1 * self.mu + (1 - self.b1) * rotated
        self.nu = self.b2 * self.nu + (1 - self.b2) * rotated**2
        mean = self.mu / (1 - self.b1**self.count)
        root = np.sqrt(self.nu / (1 - self.b2**self.count))
        return rotate(mean / (root + 1e-8), self.bases)

    @staticmethod
    def iterate(factor, basis):
        order = np.argsort(-np.diag(basis.T @ factor @ basis))
        q, r = np.linalg.qr(factor @ basis[:, order])
        return q * np.sign(np.diag(r))


SIDES = {36: (36, 5), 35: (9, 4, 5)}


@pytest.mark.parametrize("max_side", SIDES)
def test_where_the_eigenvectors_stay_it_is_adam_in_those_of_eigh_at_every_update(max_side):
    direction, scales = draw(0, 3, 3, 4, 5), (1.0, -0.5, 2.0, 0.1)
    with jax.enable_x64(True):
        tx = scale_by_soap(**DECAYS, max_side=max_side, refresh_every=2)
        gradients = [{"kernel": jnp.asarray(scale * direction)} for scale in scales]
        found, _ = run(tx, gradients, gradients[0])
    reference = Reference(SIDES[max_side], **DECAYS)
    for updates, scale in zip(found, scales, strict=True):
        expected = reference.update(scale * direction.reshape(SIDES[max_side]), "eigh")
        np.testing.assert_allclose(updates["kernel"], expected.reshape(direction.shape), atol=1e-6)


def test_rounding_errors_are_no_directions():
    """Of a gradient of rank one, the first update is that rank alone, in float32 too."""
    left, right = draw(0, 30), draw(1, 20)
    gradient = {"kernel": jnp.asarray(np.outer(left, right), "float32")}
    (updates,), _ = run(scale_by_soap(), [gradient], gradient)
    unit = np.outer(left / np.linalg.norm(left), right / np.linalg.norm(right))
    assert np.linalg.norm(updates["kernel"] - unit) < 0.05


@functools.cache
def of_a_stack(refresh_every=2):
    """Eight updates of three stacked kernels, in float64, and the states after them."""
    with jax.enable_x64(True):
        gradients = [{"scanned": {"kernel": jnp.asarray(draw(s, 3, 2, 1, 2, 4))}} for s in range(8)]
        tx, found, states = scale_by_soap(**DECAYS, refresh_every=refresh_every), [], []
        state, update = tx.init(gradients[0]), jax.jit(tx.update)
        for gradient in gradients:
            updates, state = update(gradient, state, gradient)
            found.append(np.asarray(updates["scanned"]["kernel"]))
            states.append(state)
        return [np.asarray(g["scanned"]["kernel"]) for g in gradients], found, states


def refreshed(states):
    """For each update but the first, which of the stacked kernels got other bases."""
    bases = [np.asarray(state.bases["scanned/kernel"][1]) for state in states]
    return [(new != old).any(axis=(1, 2)) for old, new in itertools.pairwise(bases)]


def test_every_kernel_of_a_stack_follows_the_reference():
    gradients, found, states = of_a_stack()
    turns = [[True] * 3, *refreshed(states)]
    for layer in range(3):
        reference = Reference((4, 4), **DECAYS)
        for gradient, updates, turn in zip(gradients, found, turns, strict=True):
            expected = reference.update(gradient[layer].reshape(4, 4), turn[layer])
            np.testing.assert_allclose(updates[layer].reshape(4, 4), expected, atol=1e-6)


def test_refreshes_take_turns():
    _, _, states = of_a_stack()
    turns = np.array(refreshed(states))
    assert (turns[:-1] != turns[1:]).all()  # each kernel in every second update
    assert set(turns.sum(axis=1)) == {1, 2}  # about half of three in each


def test_bases_reach_the_eigenvectors():
    gradients = [{"kernel": jnp.asarray(draw(seed, 6, 4), "float32")} for seed in range(60)]
    tx = scale_by_soap(factor_decay=0.99, refresh_every=1)
    _, state = run(tx, [*gradients, *[gradients[-1]] * 40], gradients[0])
    for factor, basis in zip(state.factors["kernel"], state.bases["kernel"], strict=True):
        rotated = np.asarray(basis[0].T @ factor[0] @ basis[0])
        values = np.diag(rotated)
        assert (np.diff(values) <= 0).all()
        assert abs(rotated - np.diag(values)).max() < 1e-2 * values[0]


def orthogonal(seed, n):
    return np.linalg.qr(draw(seed, n, n))[0]


def test_rotated_gradients_have_rotated_updates():
    """Equivariance under orthogonal maps of the input and of the output channels."""
    inputs, outputs = orthogonal(1, 2), orthogonal(2, 4)
    with jax.enable_x64(True):
        plain = [draw(seed, 2, 1, 2, 4) for seed in range(5)]
        turned = [np.einsum("ic,do,hwco->hwid", inputs, outputs, g) for g in plain]
        tx = scale_by_soap(refresh_every=2)
        trees = [[{"kernel": jnp.asarray(g)} for g in history] for history in (plain, turned)]
        found = [run(tx, tree, tree[0])[0] for tree in trees]
        for one, other in zip(*found, strict=True):
            expected = np.einsum("ic,do,hwco->hwid", inputs, outputs, one["kernel"])
            np.testing.assert_allclose(other["kernel"], expected, atol=1e-6)


def test_without_bases_it_is_adam():
    params = {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}
    gradients = [like(params, seed) for seed in range(3)]
    found, state = run(scale_by_soap(0.9, 0.99, max_side=1), gradients, params)
    expected, _ = run(optax.scale_by_adam(0.9, 0.99), gradients, params)
    chex.assert_trees_all_close(found, expected, rtol=1e-5)
    assert state.bases == {"kernel": (None,) * 3}


def test_heads_and_feature_groups_are_kernels_of_their_own():
    params = {
        "attention": {
            name: {"kernel": jnp.ones((6, 2, 3)), "bias": jnp.ones((2, 3))}
            for name in ("query", "key", "value")
        }
    }
    params["attention"]["out"] = {"kernel": jnp.ones((2, 3, 6)), "bias": jnp.ones(6)}
    heads = KernelAxes(inputs=-3, outputs=(-2, -1))
    view = {f"attention/{name}": heads for name in ("query/kernel", "key/kernel", "value/kernel")}
    view["attention/out/kernel"] = KernelAxes(inputs=(-3, -2), outputs=-1)
    state = scale_by_soap(view=views.flax(overrides=view)).init(params)
    shapes = {
        path: [m.shape for m in found if m is not None] for path, found in state.bases.items()
    }
    assert shapes["attention/query/kernel"] == [(2, 6, 6), (2, 3, 3)]
    assert shapes["attention/out/kernel"] == [(2, 3, 3), (2, 6, 6)]
    grouped = KernelAxes(inputs=(0, 1, 2), outputs=(3,), spatial=(0, 1), feature_groups=2)
    state = scale_by_soap(view={"kernel": grouped}).init({"kernel": jnp.ones((3, 3, 4, 10))})
    assert [m.shape for m in state.bases["kernel"]] == [(2, 36, 36), (2, 5, 5)]


PARAMS = {"kernel": jnp.asarray(draw(9, 3, 2), "float32"), "bias": jnp.ones(2)}
REST = optax.sgd(0.5, momentum=0.9)


def own():
    return soap(0.1, rest=REST, refresh_every=2)


@functools.cache
def undisturbed(count=4):
    gradients = [like(PARAMS, seed) for seed in range(count)]
    return gradients, run(own(), gradients, PARAMS)[0]


def test_rest_trains_everything_else():
    gradients, found = undisturbed()
    expected, _ = run(REST, gradients, PARAMS)
    chex.assert_trees_all_close([f["bias"] for f in found], [e["bias"] for e in expected])
    scaled, _ = run(scale_by_soap(refresh_every=2), gradients, PARAMS)
    chex.assert_trees_all_close(
        [f["kernel"] for f in found], [-0.1 * s["kernel"] for s in scaled], rtol=1e-6
    )


def test_by_default_the_rest_has_adam():
    gradients, _ = undisturbed()
    found, _ = run(soap(0.1), gradients, PARAMS)
    expected, _ = run(optax.adam(0.1), gradients, PARAMS)
    chex.assert_trees_all_close([f["bias"] for f in found], [e["bias"] for e in expected])


def test_resumed_is_undisturbed():
    gradients, found = undisturbed()
    _, state = run(own(), gradients[:2], PARAMS)
    state = jax.tree.map(lambda leaf: jnp.asarray(np.array(leaf)), state)
    update = jax.jit(own().update)
    for gradient, expected in zip(gradients[2:], found[2:], strict=True):
        updates, state = update(gradient, state, PARAMS)
        chex.assert_trees_all_equal(updates, expected)


def test_the_state_may_be_donated():
    gradients, found = undisturbed()
    state, update = own().init(PARAMS), jax.jit(own().update, donate_argnums=1)
    for gradient, expected in zip(gradients, found, strict=True):
        updates, state = update(gradient, state, PARAMS)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_multi_steps():
    gradients, found = undisturbed()
    twice = [gradient for gradient in gradients for _ in range(2)]
    accumulated, _ = run(optax.MultiSteps(own(), 2), twice, PARAMS)
    chex.assert_trees_all_close(accumulated[1::2], found, rtol=1e-5)
    chex.assert_trees_all_equal(accumulated[::2], [jax.tree.map(jnp.zeros_like, PARAMS)] * 4)


def test_apply_if_finite_skips_and_goes_on():
    gradients, found = undisturbed()
    broken = jax.tree.map(lambda g: g * jnp.nan, gradients[0])
    with_break = [*gradients[:2], broken, *gradients[2:]]
    updates, _ = run(optax.apply_if_finite(own(), 3), with_break, PARAMS)
    chex.assert_trees_all_equal(updates[2], jax.tree.map(jnp.zeros_like, PARAMS))
    chex.assert_trees_all_close([*updates[:2], *updates[3:]], found, rtol=1e-5)


def test_inject_hyperparams():
    gradients, found = undisturbed()
    tx = optax.inject_hyperparams(soap)(optax.constant_schedule(0.1), rest=REST, refresh_every=2)
    updates, state = run(tx, gradients, PARAMS)
    chex.assert_trees_all_close(updates, found, rtol=1e-5)
    assert {"learning_rate", "b1", "b2", "refresh_every"} <= set(state.hyperparams)


def test_it_is_one_of_several_optimizers():
    gradients, found = undisturbed()
    labels = {"kernel": "soap", "bias": "sgd"}
    tx = optax.partition({"soap": soap(0.1, refresh_every=2), "sgd": REST}, labels)
    chex.assert_trees_all_close(run(tx, gradients, PARAMS)[0], found, rtol=1e-6)


def is_soap(node):
    return isinstance(node, SoapState)


def test_modulation_goes_around_it_and_its_zero_in_the_first_update():
    gradient = undisturbed()[0][0]
    expected, _ = run(own(), [jax.tree.map(jnp.zeros_like, PARAMS), gradient], PARAMS)
    site = {"modulation_site": orthojax.init_site(0)}
    measured = gradient | jax.tree.map(jnp.ones_like, site)
    updates, state = run(orthojax.modulation(own()), [measured] * 2, PARAMS | site)
    chex.assert_trees_all_close([{k: u[k] for k in PARAMS} for u in updates], expected, rtol=1e-6)
    (inner,) = [leaf for leaf in jax.tree.leaves(state, is_leaf=is_soap) if is_soap(leaf)]
    for factor, basis in zip(inner.factors["kernel"], inner.bases["kernel"], strict=True):
        rotated = basis[0].T @ factor[0] @ basis[0]
        assert jnp.abs(rotated - jnp.diag(jnp.diag(rotated))).max() < 1e-5 * jnp.max(rotated)


def test_kernels_stay_orthonormal_within_stiefel():
    params, gradients = PARAMS, undisturbed()[0]
    tx = stiefel(own())
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    assert orthojax.orthonormality_error(params)["kernel"] < 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_updates_keep_a_small_dtype_and_the_state_is_wide(dtype):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    (updates,), state = run(own(), [params], params)
    chex.assert_trees_all_equal_dtypes(updates, params)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state)} <= {"float32", "int32", dtype}
    chex.assert_tree_all_finite(updates)


def test_kernels_without_a_direction():
    """One column, one row, one number; zero, then not; nothing at all."""
    shapes = {"column": (4, 1), "row": (1, 4), "number": (1, 1), "empty": (0, 4), "zero": (3, 2)}
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}
    zero = jax.tree.map(jnp.zeros_like, params)
    found, _ = run(scale_by_soap(), [zero, like(params, 0), zero], params)
    chex.assert_trees_all_equal(found[0], zero)
    chex.assert_tree_all_finite(found)
    for name in ("column", "row", "number", "zero"):
        assert 0.1 < jnp.linalg.norm(found[1][name]["kernel"]) < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b1": 1.0}, r"b1=1.0 must be a number in \[0, 1\)"),
        ({"b2": -0.1}, "b2=-0.1"),
        ({"factor_decay": 2}, "factor_decay=2"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"refresh_every": 0}, "refresh_every=0 must be an integer of at least 1"),
        ({"refresh_every": 2.5}, "refresh_every=2.5"),
        ({"max_side": 0}, "max_side=0"),
    ],
)
def test_impossible_arguments(arguments, message):
    for make in (scale_by_soap, functools.partial(soap, 0.1)):
        with pytest.raises(ConfigError, match=message):
            make(**arguments)


def test_impossible_rates_and_rests():
    with pytest.raises(ConfigError, match="learning_rate=-1 must be"):
        soap(-1)
    with pytest.raises(ConfigError, match="rest=.* must be an optax transformation"):
        soap(0.1, rest=optax.sgd)


@pytest.mark.parametrize("tx", [scale_by_soap(), own()])
def test_tree_map_params_finds_the_moments(tx):
    state = tx.init(PARAMS)
    doubled = optax.tree_map_params(tx, lambda leaf: leaf + 1, state)
    (before,), (after,) = (
        [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_soap) if is_soap(leaf)]
        for tree in (state, doubled)
    )
    for name in ("mu", "nu"):
        found, expected = getattr(after, name)["kernel"], getattr(before, name)["kernel"] + 1
        np.testing.assert_array_equal(found, expected)
    chex.assert_trees_all_equal(after.bases, before.bases)


def test_shapes_are_enough_to_begin():
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    found, expected = (own().init(tree) for tree in (shapes, PARAMS))
    chex.assert_trees_all_equal(found, expected)


def test_update_needs_params_and_kernels():
    tx = own()
    with pytest.raises(ValueError, match="params"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(ConfigError, match="none of these parameters is a kernel"):
        tx.init({"bias": jnp.ones(3)})
