"""Evaluation with batch-normalization statistics of one pass over training images."""

import chex
import jax
import numpy as np
import pytest

from orthojax.configs import digits_plain110
from orthojax.errors import ConfigError
from orthojax.models import PlainNet
from orthojax.storage.metrics import read_metrics
from orthojax.training.experiment import build
from orthojax.training.state import TrainState
from orthojax.training.step import make_recalibrate
from orthojax.training.train import train_and_evaluate


def tiny(**keys):
    config = digits_plain110.get_config("depth=8,steps=30")
    config.update({"batch_size": 32, "eval_every": 15, "checkpoint_every": 30, **keys})
    config.model.width, config.mesh.data = 4, 1
    return config


@pytest.mark.parametrize("groups", [1, 4])
def test_the_images_are_then_evaluated_as_in_training(groups):
    net = PlainNet(depth=8, width=4, num_classes=10, bn_groups=groups, modulated=True)
    images = jax.random.normal(jax.random.key(0), (32, 8, 8, 1)) * 3 + 1
    variables = jax.jit(lambda: net.init(jax.random.key(1), images, train=False))()
    wrong = jax.tree.map(lambda s: s + 7, variables["batch_stats"])
    state = TrainState(0, variables["params"], wrong, ())
    found = jax.jit(make_recalibrate(net, lambda x: x))(state, images)
    chex.assert_trees_all_equal(found.params, state.params)
    given = {"params": found.params, "batch_stats": found.batch_stats}
    evaluated = jax.jit(lambda: net.apply(given, images, train=False))()
    whole = net.clone(bn_groups=1)
    trained, _ = jax.jit(
        lambda: whole.apply(variables, images, train=True, mutable=["batch_stats"])
    )()
    np.testing.assert_allclose(evaluated, trained, rtol=1e-4, atol=1e-4 * np.abs(trained).max())


def test_training_does_not_depend_on_it(tmp_path):
    summaries = [
        train_and_evaluate(tiny(recalibrate_bn=images), tmp_path / f"{images}")
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
    config = tiny(recalibrate_bn=images)
    config.mesh.data = devices
    with pytest.raises(ConfigError, match=message):
        build(config)
