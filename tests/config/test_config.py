"""Typed arguments, sections bound to signatures, and differences of configs."""

import dataclasses
import json

import flax.linen as nn
import ml_collections
import pytest

from orthojax.config import parse_arguments
from orthojax.config.sections import bind, differences, from_json, to_json
from orthojax.errors import ConfigError

DEFAULTS = {
    "depth": 110,
    "bias": 2.0,
    "scan": True,
    "name": "run",
    "method": ("sgd", "ortho", "ortho_modulated"),
}


def test_arguments_take_the_types_of_their_defaults():
    arguments = parse_arguments("depth=44, bias=1,scan=false,name=a b,method=ortho", **DEFAULTS)
    assert vars(arguments) == {
        "depth": 44,
        "bias": 1.0,
        "scan": False,
        "name": "a b",
        "method": "ortho",
    }
    assert [type(value) for value in vars(arguments).values()] == [int, float, bool, str, str]


@pytest.mark.parametrize("text", [None, ""])
def test_arguments_default(text):
    assert vars(parse_arguments(text, **DEFAULTS)) == {**DEFAULTS, "method": "sgd"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dpeth=44", ["unknown config argument `dpeth`", "did you mean `depth`?", "method"]),
        ("depth=deep", ["depth=deep", "an integer"]),
        ("depth=4.5", ["depth=4.5", "an integer"]),
        ("bias=big", ["bias=big", "a finite number"]),
        ("bias=nan", ["bias=nan", "a finite number"]),
        ("scan=maybe", ["scan=maybe", "true or false"]),
        ("method=adam", ["method=adam", "sgd or ortho or ortho_modulated"]),
        ("depth", ["`depth`", "key=value"]),
        ("depth=44,", ["key=value"]),
        ("depth=44,depth=56", ["`depth` is set twice"]),
    ],
)
def test_bad_arguments_are_named(text, words):
    with pytest.raises(ConfigError) as error:
        parse_arguments(text, **DEFAULTS)
    for word in words:
        assert word in str(error.value)


def optimizer(learning_rate, momentum=0.9, *, mask=None):
    return learning_rate, momentum, mask


def test_bind_calls_with_the_section_and_what_is_supplied():
    section = ml_collections.ConfigDict({"learning_rate": 0.1})
    assert bind(optimizer, section, "optimizer", mask="mask") == (0.1, 0.9, "mask")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"learnin_rate": 0.1},
            ["unknown key `optimizer.learnin_rate`", "did you mean `optimizer.learning_rate`?"],
        ),
        ({"learning_rate": 0.1, "zzz": 1}, ["unknown key `optimizer.zzz`. known keys: learning"]),
        ({"momentum": 0.5}, ["missing", "`optimizer.learning_rate`"]),
        ({"learning_rate": 0.1, "mask": 1}, ["`optimizer.mask` is set by the program"]),
        (0.1, ["`optimizer` must be a section", "0.1"]),
    ],
)
def test_bind_refuses(section, words):
    with pytest.raises(ConfigError) as error:
        bind(optimizer, section, "optimizer", mask="mask")
    for word in words:
        assert word in str(error.value)


def test_bind_does_not_let_keys_disappear_in_kwargs():
    with pytest.raises(ConfigError, match="unknown key `a.typo`"):
        bind(lambda x=1, **rest: rest, {"typo": 2}, "a")


@dataclasses.dataclass
class Schedule:
    steps: int
    name: str = "cosine"


class Net(nn.Module):
    depth: int
    width: int = 8


def test_bind_builds_dataclasses_and_flax_modules():
    assert bind(Schedule, {"steps": 3, "name": "step"}, "schedule") == Schedule(3, "step")
    assert bind(Net, {"depth": 8}, "model", width=4) == Net(8, 4)


@pytest.mark.parametrize("key", ["name", "parent"])
def test_bind_keeps_the_fields_that_flax_adds_out_of_the_config(key):
    with pytest.raises(ConfigError, match=f"unknown key `model.{key}`.*known keys: depth, width$"):
        bind(Net, {"depth": 8, key: None}, "model")


def test_differences_name_the_flattened_keys():
    old = {"seed": 0, "model": {"depth": 44, "widths": (16, 32), "scan": True}, "gone": {"a": 1}}
    new = {"seed": 0, "model": {"depth": 110, "widths": [16, 32], "scan": 1}, "new": {}}
    assert differences(old, new) == [
        "gone.a: 1 removed",
        "model.depth: 44 -> 110",
        "model.scan: True -> 1",
        "new: {} added",
    ]
    assert differences(ml_collections.ConfigDict(old), old) == []


def test_json_round_trip():
    config = {"model": {"widths": (16, (32, 64)), "dtype": None, "scale": 0.1}, "name": "x"}
    restored = from_json(json.loads(json.dumps(to_json(ml_collections.ConfigDict(config)))))
    assert restored.to_dict() == config


@pytest.mark.parametrize(
    ("value", "words"), [(object(), "a object"), (float("nan"), "nan"), ({1, 2}, "a set")]
)
def test_json_names_the_key_it_cannot_hold(value, words):
    with pytest.raises(ConfigError, match=rf"`model.widths\[1\]` is {words}"):
        to_json({"model": {"widths": (1, value)}})
