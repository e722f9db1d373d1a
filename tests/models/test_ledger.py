"""The growth ledger against float64 sums by hand, and where its theory is exact."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orthojax.isometry import error_growth
from orthojax.models import PlainNet, in_order, unstack_blocks
from orthojax.models.ledger import Entry, Ledger, alignment, bias_term, growth_ledger

# Wide: what theory leaves out goes with the width.
NET = PlainNet(depth=14, width=32, kernel_init="delta_orthonormal", bn_bias=1.0)
IMAGES = jax.random.normal(jax.random.key(1), (64, 8, 8, 3))
KEY = jax.random.key(2)


@pytest.fixture(scope="module")
def variables():
    return jax.jit(lambda: NET.init(jax.random.key(0), IMAGES[:1], train=False))()


@pytest.fixture(scope="module")
def ledger(variables):
    return growth_ledger(NET, variables, KEY, IMAGES)


@pytest.fixture(scope="module")
def seen(variables):
    """Input and output of every convolution, and the moment of the error there.

    By Flax's own layers, in evaluation's statistics, and by probes: gradients with respect to an
    addend at the output of every convolution.
    """
    net = NET.clone(scan=False)
    plain = {name: unstack_blocks(tree) for name, tree in variables.items()}

    def forward(addends):
        found = []

        def spy(call, args, kwargs, context):
            out = call(*args, **kwargs)
            if isinstance(context.module, nn.Conv):
                out = out + addends[len(found)] if addends else out
                found.append((args[0], out))
            return out

        with nn.intercept_methods(spy):
            logits, _ = net.apply(plain, IMAGES, train=True, mutable=["batch_stats"])
        return jnp.sum(logits * jax.random.normal(KEY, logits.shape)), found

    shapes = jax.eval_shape(lambda: forward([])[1])
    zeros = [np.zeros(out.shape, np.float32) for _, out in shapes]
    errors, found = jax.jit(jax.grad(forward, has_aux=True))(zeros)
    return [
        (*(np.asarray(a, np.float64) for a in pair), np.mean(np.square(e, dtype=np.float64)))
        for pair, e in zip(found, errors, strict=True)
    ]


def test_growth_is_that_of_the_moments_in_units_of_the_variances(seen, ledger):
    units = np.array([moment * out.var((0, 1, 2)).mean() * out.size for _, out, moment in seen])
    expected = np.log(units[:-1] / units[1:])
    np.testing.assert_allclose([entry.growth for entry in ledger], expected, atol=1e-3)


def test_alignment_is_that_of_the_inputs_and_outputs(variables, seen, ledger):
    kernels = [
        np.asarray(leaf, np.float64)
        for path, leaf in in_order(variables["params"])
        if path.endswith("conv/kernel")
    ]
    for entry, (x, out, _), kernel in zip(ledger, seen[1:], kernels[1:], strict=True):
        # What a kernel without alignment makes of white noise of the input's size, tap by tap.
        side, stride = x.shape[1], x.shape[1] // out.shape[1]
        first = 0 if stride == 2 else -1  # "SAME" padding of an even side
        taps = first + stride * np.arange(out.shape[1])[:, None] + np.arange(3)
        inside = np.mean((taps >= 0) & (taps < side), axis=0)
        coverage = np.outer(inside, inside)[:, :, None, None]
        isotropic = np.sum(kernel**2 * coverage) * x.var((0, 1, 2)).mean()
        a = out.var((0, 1, 2)).sum() / isotropic
        np.testing.assert_allclose(entry.alignment, np.log(a), atol=1e-3)


def test_a_kernel_that_sees_one_component_alone_has_all_the_alignment_there_is():
    """C channels that are one and the same, and a kernel of ones: a = C."""
    x = np.repeat(np.random.default_rng(0).normal(size=(500, 1)), 6, axis=1)
    kernel = np.ones((1, 1, 6, 3))
    out = x @ kernel[0, 0]
    np.testing.assert_allclose(alignment(kernel, x.var(0), out.var(0)), np.log(6))


@pytest.mark.parametrize("bias", [-3.0, -0.5, 0.0, 0.7, 2.0])
def test_the_bias_term_is_the_growth_of_theory_where_channels_are_alike(bias):
    scale = np.array([0.5, -0.5, 0.5])
    expected = np.log(error_growth(bias))
    np.testing.assert_allclose(bias_term(scale, 0.5 * bias * np.ones(3)), expected, rtol=1e-6)


def test_the_bias_term_of_channels_that_differ_by_monte_carlo():
    rng = np.random.default_rng(0)
    scale, bias = rng.normal(1, 0.5, 8), rng.normal(0, 1, 8)
    y = scale * rng.normal(size=(400_000, 8)) + bias
    passed = np.mean(scale**2 * (y > 0))
    expected = np.log(passed / np.mean(np.maximum(y, 0).var(0)))
    np.testing.assert_allclose(bias_term(scale, bias), expected, atol=5e-3)


def test_at_a_near_isometric_start_the_bias_term_is_nearly_all(ledger):
    for entry, above in itertools.pairwise(ledger):
        np.testing.assert_allclose(entry.bias_term, np.log(error_growth(1.0)), rtol=1e-6)
        if "entry/layer_0" not in above.path:  # a stride of 2 drops pixels, and borders weigh more
            assert abs(entry.rest) < 0.1
            assert abs(entry.alignment) < 0.01


def test_growth_that_cancels_further_down_counts():
    """The way down is 0, -2, 1, 2 in natural logarithms; its two ends differ by 2."""
    entries = [Entry("a", 1.0, 0, 0, 0), Entry("b", 3.0, 0, 0, 0), Entry("c", -2.0, 0, 0, 0)]
    np.testing.assert_allclose(Ledger(entries).decades(), 4 / np.log(10))
    np.testing.assert_allclose(Ledger(entries).total(), 2)


def test_sites_scans_and_their_contents_change_nothing(variables, ledger):
    net = NET.clone(modulated=True)
    shapes = jax.eval_shape(lambda: net.init(KEY, IMAGES, train=False))
    given = dict(jax.tree_util.tree_leaves_with_path(variables))
    sited = jax.tree_util.tree_map_with_path(
        lambda path, leaf: given.get(path, np.full(leaf.shape, 7, leaf.dtype)), shapes
    )
    again = growth_ledger(net, sited, KEY, IMAGES)
    assert str(again) == str(ledger)
    assert len(ledger) == NET.depth - 2


def test_it_prints_a_row_for_every_layer_a_sum_and_a_verdict(ledger):
    lines = str(ledger).splitlines()
    assert len(lines) == len(ledger) + 3
    assert lines[1].startswith("stem/conv")
    assert "decades" in lines[-1]
    assert "more than any" in str(type(ledger)([ledger[0]._replace(growth=20.0)]))
