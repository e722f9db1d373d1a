"""Overrides of a config: every argument of what a section stands for, and the errors."""

import pytest
from flax import linen as nn
from ml_collections import ConfigDict

from orthojax.commands.overrides import Override, apply
from orthojax.configs import cifar10_plain, digits_plain110
from orthojax.errors import ConfigError, DatasetError
from orthojax.training.experiment import build


def overridden(*words, config=None):
    config = config or digits_plain110.get_config("depth=8")
    overrides = [Override(*word.split("=", 1), f"--config.{word}") for word in words]
    return config, apply(config, overrides)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        # Neither of these is in the file.
        ("observe_every=5", 5),
        ("model.bn_groups=2", 2),
        ("dataset.train_split=train[:256]", "train[:256]"),
        ("dataset.cache_dir=/tmp/1", "/tmp/1"),
        ("optimizer.nesterov=true", True),
        # None and a value, either way round.
        ("modulation=None", None),
        ("modulation.steps=100", 100.0),
        ("constraint.method=qr", "qr"),
        ("dataset.data_dir=None", None),
        ("dataset.data_dir=None/there", "None/there"),
        ("optimizer.momentum=None", None),
        # Values that look like another kind.
        ("model.remat=none", "none"),
        ("optimizer.learning_rate=1", 1.0),
        ("optimizer.learning_rate=1e-3", 1e-3),
        ("model.bn_bias=2", 2.0),
        ("schedule.boundaries=(0.25,0.5)", (0.25, 0.5)),
        ("schedule.boundaries=0.5", (0.5,)),
        ("schedule.boundaries=()", ()),
        ("seed=1_000", 1000),
    ],
)
def test_any_argument_of_what_a_section_stands_for(word, value):
    config, notes = overridden(word)
    key = word.partition("=")[0]
    found = config.to_dict()
    for name in key.split("."):
        found = found[name]
    assert (found, type(found)) == (value, type(value)) and not notes


def test_a_section_that_is_none_is_made():
    config, _ = overridden("modulation.steps=7", config=cifar10_plain.get_config("method=baseline"))
    assert config.modulation.to_dict() == {"steps": 7}
    config, _ = overridden("mesh={'fsdp': 2}")
    assert config.mesh.to_dict() == {"fsdp": 2}


def test_a_name_that_looks_like_a_number_is_one():
    with pytest.raises(DatasetError, match="'123'"):  # looked up, as any new name
        overridden("dataset.name=123")


def test_of_two_the_last_counts():
    assert overridden("seed=1", "seed=2")[0].seed == 2


@pytest.mark.parametrize(
    ("words", "kept", "dropped"),
    [
        (
            ["optimizer.name=adam"],
            {"name": "adam", "learning_rate": 0.005},
            " keeps learning_rate=0.005; drops momentum=0.9",
        ),
        (
            ["optimizer.name=rmsprop"],
            {"momentum": 0.9, "learning_rate": 0.005},
            " keeps learning_rate=0.005, momentum=0.9",
        ),
        (["optimizer.b1=0.8", "optimizer.name=adam"], {"b1": 0.8}, "drops momentum=0.9"),
        (
            ["schedule.name=cosine"],
            {"warmup_steps": 20},
            " keeps warmup_steps=20; drops boundaries=(0.5, 0.75), factor=0.1",
        ),
        (["regularizer.name=none"], {"name": "none"}, " drops coefficient=0.0001"),
        (["regularizer.name=l2"], {"coefficient": 1e-4}, " keeps coefficient=0.0001"),
        (["optimizer.name=sgd"], {"momentum": 0.9}, None),
        (["model.name=ResNet"], {"depth": 8, "width": 8}, "depth=8, kernel_init"),
    ],
)
def test_another_name_drops_the_keys_of_the_old_one_and_names_what_stays(words, kept, dropped):
    config, notes = overridden(*words)
    section = words[0].partition(".")[0]
    assert kept.items() <= config[section].to_dict().items()
    assert [dropped in note for note in notes] == ([True] if dropped else [])
    build(config, records=False)  # which takes no key that nothing reads


@pytest.mark.parametrize("first", ["PlainNet", "flax.linen:Conv"])
def test_a_net_of_ones_own_takes_no_key_of_another_net(first, monkeypatch):
    """`features` of one is no `features` of the other, nor is `depth` a depth."""

    class Own(nn.Module):
        depth: int = 2
        features: int = 7

    monkeypatch.setattr(nn, "Own", Own, raising=False)
    config = digits_plain110.get_config("depth=8")
    config.model = ConfigDict({"name": first, "depth": 8, "features": 32})
    config, [note] = overridden("model.name=flax.linen:Own", "model.features=9", config=config)
    assert config.model.to_dict() == {"name": "flax.linen:Own", "features": 9}
    assert note == "model.name=flax.linen:Own drops depth=8"


def test_another_data_set_drops_what_its_loader_does_not_take():
    config, notes = overridden("dataset.name=imagenet2012", config=cifar10_plain.get_config())
    assert config.dataset.to_dict() == {"name": "imagenet2012", "data_dir": None, "flip": True}
    assert "downsample" in notes[0]


def test_a_run_shorter_than_the_warmup_of_the_file():
    config, [note] = overridden("steps=4")
    assert config.schedule.warmup_steps == 4 and "warmup_steps" in note
    build(config, records=False)
    config, notes = overridden("steps=4", "schedule.warmup_steps=9")
    assert config.schedule.warmup_steps == 9 and not notes
    with pytest.raises(ConfigError, match="warmup_steps` is 9; .*from 0 to steps=4"):
        build(config, records=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimizer.lr=0.1"], "`optimizer.lr`; did you mean `optimizer.learning_rate`"),
        (["modl.depth=8"], "unknown section `modl`; did you mean `model`"),
        (["model.modulation=1"], "unknown key `model.modulation`; did you mean `modulation`"),
        (["model.dtype=int8"], "unknown key `model.dtype`; did you mean `dtype`"),
        (["a.b.c=1"], "unknown section `a.b`"),
        ([".=1"], "unknown section|unknown key"),
        (["=1"], "unknown key"),
        (["model.scan=maybe"], "`model.scan` is 'maybe'; it must be true or false"),
        (["batch_size=ten"], "`batch_size` is 'ten'; it must be an integer"),
        (["steps=3.5"], "`steps` is 3.5; it must be an integer"),
        (["seed=True"], "`seed` is True; it must be an integer"),
        (["model.width=None"], "`model.width` is None; it must be an integer"),
        (["optimizer=None"], "`optimizer` is None; it must be a section"),
        (["optimizer.learning_rate=nan"], "nan, which is not a finite number"),
        (["optimizer.learning_rate=fast"], "'fast'; it must be a finite number"),
        (["schedule.boundaries=('a',)"], "every element is a finite number"),
        (["schedule.boundaries=(0.5,"], "it must be a tuple"),
        (["optimizer.name=adma"], "`optimizer.name` is 'adma'; did you mean `adam`"),
        (["optimizer.name=adam", "optimizer.momentum=0.9"], "unknown key `optimizer.momentum`"),
        (["modulation=None", "modulation.steps=3"], "sets the whole section; give one"),
    ],
)
def test_the_override_that_is_wrong_is_the_one_that_is_named(words, message):
    right = ["log_every=4", "regularizer.coefficient=0.1"]
    with pytest.raises(ConfigError, match=message) as error:
        overridden(*right, *words)
    assert str(error.value).startswith(f"--config.{words[-1]}: ")
    assert "log_every" not in str(error.value).partition("known")[0]


def test_a_config_file_is_held_to_the_same_kinds():
    config = ConfigDict(digits_plain110.get_config("depth=8"))
    with config.ignore_type():
        config.optimizer.momentum = "0.9"
    with pytest.raises(ConfigError, match="`optimizer.momentum` is '0.9'; it must be a finite"):
        build(config, records=False)


def test_an_optimizer_within_the_optimizer():
    words = ("optimizer.rest.learning_rate=0.1", "optimizer.rest.name=sgd", "optimizer.name=soap")
    config, notes = overridden(*words)
    rest = {"name": "sgd", "learning_rate": 0.1}
    assert config.optimizer.to_dict() == {"name": "soap", "learning_rate": 0.005, "rest": rest}
    assert notes == ["optimizer.name=soap keeps learning_rate=0.005; drops momentum=0.9"]
    whole, _ = overridden("optimizer.name=soap", f"optimizer.rest={rest}")
    assert whole.optimizer.to_dict() == config.optimizer.to_dict()
    build(config)
    for word, message in (
        ("optimizer.rest.name=sgd", "unknown key `optimizer.rest`"),  # SGD has no rest
        ("optimizer.rest.learning_rate=0.1", "unknown key `optimizer.rest`"),
    ):
        with pytest.raises(ConfigError, match=message):
            overridden(word)
