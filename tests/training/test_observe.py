"""What a run records of its layers: in the order of the layers, and without touching training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from orthojax import mean_correlation
from orthojax.models import BatchNorm, ImageNetResNet, PlainNet, in_order, unstack_blocks
from orthojax.sites import SITE, measurement
from orthojax.storage.metrics import read_metrics
from orthojax.training.train import train_and_evaluate
from tests.models.small_nets import filled_variables
from tests.training.tiny import programs_shared, tiny_config


@pytest.mark.parametrize(
    "net", [PlainNet(depth=74, width=2), ImageNetResNet(depth=34, width=2, num_classes=5)]
)
def test_layers_come_in_the_order_in_which_they_are_called(net):
    """Twelve blocks a stage, so that 10 would stand before 2 in the alphabet."""
    called = []

    def record(call, args, kwargs, context):
        if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
            called.append("/".join(context.module.path))
        return call(*args, **kwargs)

    def shapes(net):
        images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        return jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), images)

    with nn.intercept_methods(record):
        unrolled = shapes(net.clone(scan=False))["params"]
    for variables in (unrolled, unstack_blocks(jax.tree.map(fill, shapes(net)["params"]))):
        found = [name for name, _ in in_order(variables) if name.endswith("/bn/bias")]
        assert [name.removesuffix("/bias") for name in found] == called


def fill(shape):
    return np.zeros(shape.shape)


@pytest.fixture(scope="module", autouse=True)
def shared():
    yield from programs_shared()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Metrics of the same run on four devices, watched and not."""
    found = []
    for every in (0, 2):
        config = tiny_config(5, log_every=1, observe_every=every, mesh={"data": 2, "fsdp": 2})
        workdir = tmp_path_factory.mktemp("run") / "run"
        train_and_evaluate(config, workdir)
        found.append(read_metrics(workdir))
    return found


def test_watching_changes_nothing(runs):
    alone, watched = runs
    assert [record for record in watched if record["kind"] != "layers"] == alone


def test_what_is_recorded(runs):
    records = [record for record in runs[1] if record["kind"] == "layers"]
    assert [record["step"] for record in records] == [2, 4]
    for record in records:
        assert len(record["second_moment"]) == len(record["scale"]) == 7  # convolutions
        assert min(record["second_moment"]) > 0 and record["scale"][-1] == 1  # the top's
        columns = [4] * 3 + [8] * 2 + [16] * 2 + [10]
        pairs = sum(n * (n - 1) // 2 for n in columns)
        total = record["correlation_off_diagonal"] * pairs + sum(columns)
        assert record["correlation"] == pytest.approx(total / (pairs + sum(columns)), rel=1e-4)
        assert record["correlation_absolute"] >= abs(record["correlation_off_diagonal"])


def test_moments_are_those_of_the_cotangents():
    """The recorded second moments against the cotangents that autodiff itself gives."""
    net = PlainNet(depth=8, width=4, num_classes=3, modulated=True)
    images = np.random.default_rng(1).normal(size=(4, 8, 8, 1)).astype(np.float32)

    def loss(params, taps):
        def tap(call, args, kwargs, context):
            if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
                args = (args[0] + taps.pop(0), *args[1:])
            return call(*args, **kwargs)

        taps = list(taps)
        with nn.intercept_methods(tap):
            state = {**variables, "params": params}
            logits, _ = net.apply(state, images, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(logits))

    net = net.clone(scan=False)
    variables = filled_variables(net, images)
    taps = [
        np.zeros((4, s, s, c), np.float32)
        for s, c in ((8, 4),) * 3 + ((4, 8),) * 2 + ((2, 16),) * 2
    ]
    grads, cotangents = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables["params"], taps)
    found = [measurement(leaf)[0] for path, leaf in in_order(grads) if path.endswith(SITE)]
    expected = [np.mean(np.square(np.asarray(c, np.float64))) for c in cotangents]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_correlation_of_a_scanned_net_is_that_of_its_unrolled_twin():
    net = PlainNet(depth=14, width=2, num_classes=3)
    params = filled_variables(net, np.ones((1, 8, 8, 1), np.float32))["params"]
    correlation = jax.jit(mean_correlation)
    np.testing.assert_allclose(correlation(params), correlation(unstack_blocks(params)), rtol=1e-5)
