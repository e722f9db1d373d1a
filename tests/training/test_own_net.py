"""Somebody's linen classifiers, unedited, in this project's trainer."""

import shutil

import jax
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

import orthojax
from orthojax.commands import overrides
from orthojax.configs import digits_plain110
from orthojax.describe import describe
from orthojax.errors import ConfigError
from orthojax.sites import SITE
from orthojax.sites.modulation import find_state
from orthojax.training.compiled import abstract_state
from orthojax.training.experiment import build
from orthojax.training.train import train_and_evaluate
from tests.training.tiny import programs_shared, tiny_config


class ConvNet(nn.Module):
    """With batch normalization and dropout."""

    features: int = 4
    num_classes: int = 3

    @nn.compact
    def __call__(self, images, train):
        x = images
        for _ in range(2):
            x = nn.Conv(self.features, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(0.1, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.num_classes)(x)


class Linear(nn.Module):
    """Neither statistics nor a number of classes to set."""

    classes: int = 10

    @nn.compact
    def __call__(self, images, train):
        del train
        x = nn.relu(nn.Dense(16)(images.reshape(len(images), -1)))
        return nn.Dense(self.classes)(x)


class Attention(nn.Module):
    """Kernels that their shapes do not tell, in a stack, and a parameter that is no layer's."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, images, train):
        x = images.reshape(len(images), 8, 8)
        x = x + self.param("position", nn.initializers.zeros, (8, 8))
        heads = nn.vmap(
            nn.MultiHeadDotProductAttention,
            in_axes=None,
            axis_size=2,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        return nn.Dense(self.num_classes)(heads(num_heads=2, name="heads")(x).mean((0, 2)))


class Sideways(nn.Module):
    """Not called as a classifier is."""

    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(images)


no_module = dict


def config_of(net, *, modulated=True, steps=4, **arguments):
    config = tiny_config(steps, checkpoint_every=2)
    config.model = ConfigDict({"name": f"{__name__}:{net}", **arguments})
    config.optimizer.learning_rate = 0.05
    if not modulated:
        with config.ignore_type():
            config.modulation = None
    return config


@pytest.fixture(scope="module", autouse=True)
def shared():
    yield from programs_shared()


@pytest.mark.parametrize(("net", "modulated"), [("ConvNet", True), ("Linear", False)])
def test_it_trains_resumes_and_loads(net, modulated, tmp_path):
    config = config_of(net, modulated=modulated)
    whole = train_and_evaluate(config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    (tmp_path / "stopped" / "summary.json").unlink()
    shutil.rmtree(tmp_path / "stopped" / "checkpoints" / "4")
    again = train_and_evaluate(config, tmp_path / "stopped")
    assert (again["resumed_from_step"], again["test_loss"]) == (2, whole["test_loss"])
    loaded = orthojax.load_classifier(tmp_path / "whole", "latest", own_net=config.model.name)
    found = loaded.predict(np.zeros((2, 8, 8, 1), np.uint8))
    assert found.shape == (2, 10)
    with pytest.raises(ValueError, match=f"can be folded, not {net}"):
        loaded.folded()


def test_it_learns(tmp_path):
    config = config_of("Linear", steps=80)
    config.checkpoint_every, config.batch_size = 80, 128
    assert train_and_evaluate(config, tmp_path)["test_accuracy"] > 0.6


def test_every_layer_but_the_last_is_modulated():
    experiment = build(config_of("ConvNet"))
    assert experiment.net.net.num_classes == 10  # the data set's
    state = abstract_state(experiment)
    paths = [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(state.params)]
    assert sum(SITE in path for path in paths) == 3
    assert len(jax.tree.leaves(find_state(state.opt_state).sites)) == 3


@pytest.mark.parametrize("section", ["regularizer", "constraint", "optimizer"])
def test_its_layers_say_what_their_kernels_are(section):
    config = config_of("Attention", modulated=False)
    with config.ignore_type():
        config.regularizer = {"name": "ortho" if section == "regularizer" else "none"}
        if section == "constraint":
            config.constraint = {}
        if section == "optimizer":
            config.optimizer = {"name": "soap", "learning_rate": 0.01}
    experiment = build(config)
    params = abstract_state(experiment).params
    kernels = {row.path: row.blocks for row in describe(params, view=experiment.view).rows}
    assert kernels.pop("position") == 0 and kernels["Dense_0/kernel"] == 1
    heads = {f"heads/{name}/kernel": 2 for name in ("query", "key", "value", "out")}
    assert heads.items() < kernels.items()


def test_the_command_line_takes_its_name_and_its_arguments():
    config = digits_plain110.get_config("depth=8")
    words = (("model.name", f"{__name__}:Linear"), ("model.classes", "12"))
    notes = overrides.apply(
        config, [overrides.Override(key, value, f"--config.{key}={value}") for key, value in words]
    )
    assert config.model.to_dict() == {"name": f"{__name__}:Linear", "classes": 12}
    assert ":Linear drops " in notes[0] and "depth=8" in notes[0]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of("ConvNet", feature=4), "unknown key `model.feature`; did you mean"),
        (config_of("Linear", classes=7), r"returns \(2, 7\), and not \(2, 10\)"),
        (config_of("Sideways"), r"cannot be called as net\(images, train=True\)"),
        (config_of("Missing"), "has no attribute 'Missing'"),
        (config_of("no_module"), "is no flax.linen.Module"),
    ],
    ids=["argument", "classes", "call", "attribute", "kind"],
)
def test_what_is_wrong_is_named(config, message):
    with pytest.raises(ConfigError, match=message):
        build(config)


def test_a_module_that_is_not_there():
    config = config_of("Linear")
    config.model.name = "there_is_none.such:Net"
    with pytest.raises(ConfigError, match="or its folder in PYTHONPATH"):
        build(config)


def test_statistics_of_one_pass_are_for_our_own_nets():
    config = config_of("ConvNet")
    config.recalibrate_bn = 64
    with pytest.raises(ConfigError, match="only nets of orthojax.models know; set it to 0"):
        build(config)
