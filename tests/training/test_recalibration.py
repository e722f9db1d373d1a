"""Evaluation with batch-normalization statistics of one pass over training images."""

import chex
import jax
import numpy as np
import pytest

from orthojax.errors import ConfigError
from orthojax.models import PlainNet
from orthojax.storage.metrics import read_metrics
from orthojax.training.experiment import build
from orthojax.training.state import TrainState
from orthojax.training.step import make_recalibrate
from orthojax.training.train import train_and_evaluate
from tests.training.tiny import tiny_config


def test_the_images_are_then_evaluated_as_in_training():
    """The whole batch at once, also where training takes its statistics from groups."""
    net = PlainNet(depth=8, width=4, num_classes=10, bn_groups=4, modulated=True)
    images = np.random.default_rng(0).normal(1, 3, (32, 8, 8, 1)).astype(np.float32)
    variables = jax.jit(lambda: net.init(jax.random.key(1), images, train=False))()
    wrong = jax.tree.map(lambda s: np.asarray(s) + 7, variables["batch_stats"])
    state = TrainState(0, variables["params"], wrong, ())
    found = jax.jit(make_recalibrate(net, lambda x: x))(state, images)
    chex.assert_trees_all_equal(found.params, state.params)
    given = {"params": found.params, "batch_stats": found.batch_stats}
    whole = net.clone(bn_groups=1)

    @jax.jit
    def evaluated_and_trained():
        evaluated = net.apply(given, images, train=False)
        return evaluated, whole.apply(variables, images, train=True, mutable=["batch_stats"])[0]

    evaluated, trained = evaluated_and_trained()
    np.testing.assert_allclose(evaluated, trained, rtol=1e-4, atol=1e-4 * np.abs(trained).max())


def test_training_does_not_depend_on_it(tmp_path):
    summaries = [
        train_and_evaluate(
            tiny_config(4, log_every=1, recalibrate_bn=images), tmp_path / f"{images}"
        )
        for images in (0, 64)
    ]
    training = [
        [record for record in read_metrics(tmp_path / name) if record["kind"] == "train"]
        for name in ("0", "64")
    ]
    assert training[0] == training[1]
    assert summaries[0]["test_loss"] != summaries[1]["test_loss"]


@pytest.mark.parametrize(
    ("images", "devices", "message"),
    [
        (-1, 1, "recalibrate_bn"),
        (6, 4, "recalibrate_bn=6"),
        (10_000, 1, "there are 1437 training images"),
    ],
)
def test_impossible_numbers_are_named(images, devices, message):
    config = tiny_config(recalibrate_bn=images)
    config.mesh.data = devices
    with pytest.raises(ConfigError, match=message):
        build(config)
