"""What defines the nets of others: linear at first, an identity inside, a shift, a zero scale."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

from orthojax.inference.folding import FoldedNet, fold_batch_norm
from orthojax.initializers import mirrored, orthonormal
from orthojax.models import PlainNet, ResNet, unstack_blocks
from orthojax.models.activations import ACTIVATIONS, ShiftedRelu, crelu
from orthojax.models.dirac import dirac_kernel
from orthojax.sites.modulation import modulation, read_moments
from orthojax.training.compiled import ONCE
from orthojax.training.optimizers import make_optimizer
from tests.models.small_nets import SmallPlainNet, SmallResNet, compiled_pass, filled_variables

NETS = {
    "tanh": {"norm": "none", "activation": "tanh", "kernel_gain": 1.02, "bias_std": 0.01},
    "looks-linear": {"norm": "none", "activation": "crelu"},
    "shifted": {"norm": "none", "activation": "shifted_relu"},
    "tailored": {"norm": "none", "activation": "tailored_relu"},
    "shaped": {"norm": "none", "activation": "shaped_softplus", "depth": 3},
    "normalized tanh": {"activation": "tanh", "bn_scale": 0.4},
    "Dirac": {"parametrization": "dirac"},
    "RepVGG": {"parametrization": "repvgg"},
    "carrying": {"kernel_init": "carrying", "carry": 0.5, "activation": "prelu"},
}


def make(name):
    kernel_init = "he" if name in ("Dirac", "RepVGG") else "delta_orthonormal"
    return SmallPlainNet(**{"kernel_init": kernel_init, **NETS[name]})


def initialized(net, images):
    init = functools.partial(net.init, train=False)
    return jax.jit(init, compiler_options=ONCE["cpu"])(jax.random.key(0), images)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


@pytest.mark.parametrize("name", NETS)
def test_scanned_and_unrolled_are_one_net(name, images):
    net = make(name)
    variables = filled_variables(net, images)

    @jax.jit
    def both(variables):
        forms = (net, variables), (net.clone(scan=False), unstack_blocks(variables))
        return [n.apply(v, images, train=True, mutable=["batch_stats"])[0] for n, v in forms]

    np.testing.assert_allclose(*both(variables), rtol=1e-4, atol=1e-4)


def test_a_looks_linear_net_is_linear_at_initialization(images):
    net = make("looks-linear")
    variables = initialized(net, images)
    other = jax.random.normal(jax.random.key(2), images.shape)
    inputs = jnp.stack([images, other, 2 * images - 3 * other])
    one, two, both = jax.jit(lambda xs: [net.apply(variables, x, train=True) for x in xs])(inputs)
    np.testing.assert_allclose(both, 2 * one - 3 * two, rtol=1e-4, atol=1e-5)
    assert float(jnp.abs(both).max()) > 0.1


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 5), (8, 16)])
def test_mirrored_kernels_undo_a_crelu(inputs, outputs):
    x = jax.random.normal(jax.random.key(3), (4, inputs // 2))
    kernel = mirrored(orthonormal())(jax.random.key(4), (inputs, outputs))
    np.testing.assert_allclose(crelu(x) @ kernel, x @ kernel[: inputs // 2], atol=1e-6)


def test_a_dirac_kernel_is_the_identity_and_filters_of_one_norm(images):
    """Each output is a times its own input, plus b times a filter of norm 1, in float64."""
    generator = np.random.default_rng(0)
    filters = generator.normal(size=(3, 3, 3, 3))
    a, b = generator.normal(size=(2, 3))
    x = np.asarray(images, np.float64)
    kernel = dirac_kernel(*(jnp.asarray(v, jnp.float32) for v in (filters, a, b)))
    found = lax.conv_general_dilated(
        images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    unit = filters / np.sqrt((filters**2).sum((0, 1, 2)))
    wanted = a * x + b * np.einsum("nhwcij,ijcm->nhwm", windows, unit)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_only_kernels_that_keep_the_shape_are_dirac_kernels(images):
    shapes = jax.eval_shape(lambda: make("Dirac").init(jax.random.key(0), images, train=False))
    stage = shapes["params"]["stage_2"]
    assert "dirac_identity" not in stage["entry"]["layer_0"]
    assert stage["entry"]["layer_1"]["dirac_scale"].shape == (8,)
    scanned = shapes["params"]["stage_1"]["scanned"]
    assert scanned["layer_0"]["dirac_identity"].shape == (2, 4)


def test_a_carrying_net_begins_with_the_channels_that_it_carries(images):
    """What the others compute does not reach them, through convolutions, BN and PReLU."""
    net = SmallPlainNet(**NETS["carrying"])
    variables = initialized(net, images)
    stage = variables["params"]["stage_1"]["scanned"]["layer_0"]
    assert stage["ParametricRelu_0"]["slope"].tolist() == [[1, 1, 0, 0]] * 2
    changed = jax.tree.map(jnp.copy, variables)
    kernel = changed["params"]["stage_1"]["scanned"]["layer_1"]["conv"]["kernel"]
    changed["params"]["stage_1"]["scanned"]["layer_1"]["conv"]["kernel"] = kernel.at[
        ..., 2:
    ].multiply(-2)

    @jax.jit
    def entering(variables):
        _, caught = net.apply(
            variables,
            images,
            train=False,
            capture_intermediates=lambda module, _: module.name == "stage_1",
        )
        return caught["intermediates"]["stage_1"]["__call__"][0]

    before, after = entering(variables), entering(changed)
    np.testing.assert_array_equal(before[..., :2], after[..., :2])
    assert jnp.abs(before[..., 2:] - after[..., 2:]).max() > 0.1


def test_a_share_that_carries_nothing_is_refused():
    with pytest.raises(ValueError, match="carry=0.5 changes nothing where kernel_init='he'"):
        SmallPlainNet(carry=0.5)


def test_a_shifted_relu_passes_what_is_above_its_shift():
    x = jnp.asarray([[-3.0, -0.9], [0.5, -1.5]])
    y, variables = ShiftedRelu().init_with_output(jax.random.key(0), x)
    np.testing.assert_array_equal(y, jnp.asarray([[-1.0, -0.9], [0.5, -1.0]]))
    gradient = jax.grad(lambda v: ShiftedRelu().apply(v, x).sum())(variables)
    np.testing.assert_array_equal(gradient["params"]["shift"], [1.0, 1.0])  # what it clips


@pytest.mark.parametrize("layers", [13, 109])
@pytest.mark.parametrize("name", ["tailored_relu", "shaped_softplus"])
def test_activations_solved_from_the_depth_keep_second_moments(name, layers):
    x = jnp.asarray(np.random.default_rng(5).standard_normal(1_000_000), jnp.float32)
    y = ACTIVATIONS[name](layers, 0.0).make()(x)
    np.testing.assert_allclose(jnp.mean(jnp.square(y)), 1, rtol=1e-2)


def test_residual_branches_begin_at_zero(images):
    """The branches' kernels change nothing until their last scales move."""
    net = SmallResNet(zero_init_residual=True)
    variables = initialized(net, images)
    block = variables["params"]["stage_1"]["scanned"]
    assert not block["layer_1"]["bn"]["scale"].any() and block["layer_0"]["bn"]["scale"].all()
    assert variables["params"]["stage_2"]["entry"]["shortcut"]["bn"]["scale"].all()
    gradients = compiled_pass(net, variables, images)[0]["stage_1"]["scanned"]
    assert not gradients["layer_0"]["conv"]["kernel"].any()
    assert gradients["layer_1"]["bn"]["scale"].any()


@pytest.mark.parametrize("name", ["normalized tanh", "Dirac"])
def test_folding_knows_the_others(name, images):
    net = make(name)
    variables = filled_variables(net, images)
    chain = fold_batch_norm(variables)
    folded = jax.jit(lambda: FoldedNet(net).apply(chain, images, train=False))()
    plain = jax.jit(lambda: net.apply(variables, images, train=False))()
    np.testing.assert_allclose(folded, plain, rtol=1e-3)


def test_modulation_of_a_net_without_normalization(images):
    """A site behind every convolution, at which the error is held to its bounds."""
    net = SmallPlainNet(norm="none", activation="tanh", modulated=True)
    tx = modulation(optax.sgd(0.0), tolerance=1.0)
    params = initialized(net, images)["params"]
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        gradients = jax.grad(lambda p: jnp.sum(net.apply({"params": p}, images, train=True) ** 2))
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
    ledger = read_moments(state)
    assert len(ledger) == 7 and ledger[-1].growth is None
    left = [site.scale**2 * site.moment for site in ledger]
    np.testing.assert_allclose(left, left[-1], rtol=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "layer"}, "norm='layer' must be one of 'batch', 'none'"),
        ({"activation": "gelu"}, "activation='gelu'"),
        ({"parametrization": "weight"}, "parametrization='weight'"),
        ({"norm": "none", "bn_bias": 1.0}, "bn_bias=1.0 changes nothing"),
        ({"bias_std": 0.1}, "bias_std=0.1 changes nothing"),
        ({"kernel_init": "he", "kernel_gain": 2.0}, "kernel_gain=2.0"),
        ({"activation": "crelu", "parametrization": "dirac"}, "as many outputs as inputs"),
    ],
)
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        PlainNet(depth=8, **options)


def test_no_shortcut_doubles_channels():
    with pytest.raises(ValueError, match="doubles the channels"):
        ResNet(depth=8, activation="crelu")


def test_muon_orthogonalizes_every_kernel_of_a_stack():
    """Singular values near 1, and the update of a stack that of its kernels one by one."""
    kernels = np.random.default_rng(6).standard_normal((3, 3, 3, 4, 4), np.float32)
    tx, _ = make_optimizer(
        optimizer={"name": "muon", "learning_rate": 1.0},
        schedule={"name": "constant"},
        regularizer={"name": "none"},
        steps=10,
    )

    @jax.jit
    def update(params):
        return tx.update(params, tx.init(params), params)[0]

    stacked = update({"conv": {"kernel": kernels}, "bn": {"bias": np.ones(4, np.float32)}})
    for index, kernel in enumerate(kernels):
        alone = np.asarray(update({"conv": {"kernel": kernel}})["conv"]["kernel"])
        np.testing.assert_allclose(stacked["conv"]["kernel"][index], alone, rtol=1e-4, atol=1e-5)
        values = np.linalg.svd(alone.reshape(-1, 4), compute_uv=False)
        assert 0.6 < values.min() <= values.max() < 1.3, values
    adam = optax.nadam(1.0)
    bias, *_ = adam.update(jnp.ones(4), adam.init(jnp.ones(4)))
    np.testing.assert_allclose(stacked["bn"]["bias"], bias, rtol=1e-5)
