"""Fine-tuning: what is taken over, what is fresh, and what is refused."""

import sys

import jax
import numpy as np
import PIL.Image
import pytest

import orthojax
from orthojax.errors import UserError, WorkdirError
from orthojax.sites import is_site
from orthojax.training import train
from orthojax.training.compiled import abstract_state
from orthojax.training.experiment import build
from orthojax.training.fine_tune import check_fits, take_over
from orthojax.training.restore import read_trained
from orthojax.training.train import train_and_evaluate
from orthojax.tree_paths import path_name
from tests.training.tiny import programs_shared, tiny_config


@pytest.fixture(scope="module", autouse=True)
def shared():
    yield from programs_shared()


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("first")
    train_and_evaluate(tiny_config(), workdir)
    return workdir


@pytest.fixture(scope="module")
def state():
    return train.compile_steps(build(tiny_config())).init()


def leaves(tree):
    found = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return {name: np.asarray(leaf) for name, leaf in found.items()}


def test_with_the_same_classes_everything_is_the_other_runs_to_the_last_bit(first, state):
    source = read_trained(first)
    taken, told = take_over(state, source, source.class_names)
    given = leaves(source.variables["params"])
    for path, leaf in jax.tree_util.tree_leaves_with_path(taken.params):
        if not is_site(path):
            np.testing.assert_array_equal(leaf, given.pop(path_name(path)))
    assert not given
    statistics = leaves(source.variables["batch_stats"])
    for name, leaf in leaves(taken.batch_stats).items():
        np.testing.assert_array_equal(leaf, statistics[name])
    for old, new in zip(
        jax.tree.leaves(state.opt_state), jax.tree.leaves(taken.opt_state), strict=True
    ):
        np.testing.assert_array_equal(old, new)
    assert told.startswith("the head is kept; BN statistics kept")


def test_with_other_classes_the_head_is_fresh_and_no_more(first, state):
    source = read_trained(first)
    letters = tuple("abcdefghij")  # as many as there are digits
    taken, told = take_over(state, source, letters)
    before, given, after = (
        leaves(tree) for tree in (state.params, source.variables["params"], taken.params)
    )
    for name, leaf in after.items():
        fresh = name.startswith("head") or "modulation_site" in name
        np.testing.assert_array_equal(leaf, (before if fresh else given)[name])
    assert told.startswith("head/bias and head/kernel fresh (10 classes here, 10 there)")


def test_a_head_of_another_size_is_fresh(first, state):
    fewer = {"kernel": np.ones((16, 2), np.float32), "bias": np.ones(2, np.float32)}
    fewer = jax.device_put(fewer, state.params["head"]["bias"].sharding)
    taken, _ = take_over(
        state.replace(params={**state.params, "head": fewer}), read_trained(first), ("x", "y")
    )
    assert {name: leaf.shape for name, leaf in taken.params["head"].items()} == {
        "kernel": (16, 2),
        "bias": (2,),
    }


def test_another_net_is_refused_by_the_name_of_a_parameter(first):
    config = tiny_config()
    config.model.width = 8
    source = read_trained(first)
    with pytest.raises(WorkdirError, match=r"parameter \S+ is \[.*\] in that run, and \["):
        take_over(abstract_state(build(config)), source, source.class_names)


def test_another_net_is_refused_before_an_image_is_read(first, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", None)
    config = tiny_config()
    with config.unlocked():
        config.init_from = str(first)
        config.model.width = 8
    with pytest.raises(WorkdirError, match=r"`init_from`: parameter \S+ is \[.*\] in that run"):
        train_and_evaluate(config, tmp_path / "second")
    assert not list(tmp_path.iterdir())


def test_other_images_are_refused_before_anything_is_compiled(first, state):
    shapes = jax.eval_shape(lambda: state)
    stem = {"conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 3, 4), np.float32)}}
    with pytest.raises(WorkdirError, match="stem/conv/kernel is .* and .3, 3, 3, 4. here"):
        check_fits(shapes.replace(params={"stem": stem}), read_trained(first), ("x", "y"))


def test_a_missing_extra_is_named_before_an_image_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "build", None)
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"\[tensorboard\]"):
        train_and_evaluate(tiny_config(tensorboard=True), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_it_starts_where_the_other_run_was_and_resumes_as_itself(first, tmp_path, capfd):
    config = tiny_config()
    config.optimizer.learning_rate = 0.0
    with config.unlocked():
        config.init_from = str(first)
    train_and_evaluate(config, tmp_path / "second")
    assert "begins as step " in capfd.readouterr().err
    kernel = read_trained(first).variables["params"]["head"]["kernel"]
    again = orthojax.load_classifier(tmp_path / "second").variables["params"]["head"]["kernel"]
    np.testing.assert_array_equal(kernel, again)
    config.steps = 14
    summary = train_and_evaluate(config, tmp_path / "second")
    assert summary["resumed_from_step"] == 12
    assert "begins as step " not in capfd.readouterr().err


@pytest.mark.slow
def test_to_pictures_of_other_classes(tmp_path):
    """From three classes to two, on pictures of one's own."""
    pytest.importorskip("grain")
    pytest.importorskip("simplejpeg")
    pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    for name, classes in (("first", "abc"), ("second", "xy")):
        for split in ("train", "test"):
            for label, letter in enumerate(classes):
                place = tmp_path / name / split / letter
                place.mkdir(parents=True)
                for index in range(4):
                    pixels = rng.integers(0, 80, (20, 20, 3)) + 80 * (np.arange(3) == label)
                    PIL.Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")
    config = tiny_config()
    config.batch_size = 4
    with config.unlocked(), config.ignore_type():
        config.dataset = {"name": "folder", "resize": 18, "crop": 16, "workers": 0}
        config.dataset.data_dir = str(tmp_path / "first")
        config.steps = 4
        train_and_evaluate(config, tmp_path / "one")
        config.dataset.data_dir = str(tmp_path / "second")
        config.init_from = str(tmp_path / "one")
    train_and_evaluate(config, tmp_path / "two")
    net = orthojax.load_classifier(tmp_path / "two")
    assert net.class_names == ("x", "y")
    assert net.variables["params"]["head"]["kernel"].shape[-1] == 2


def test_a_run_that_is_not_there_is_named(tmp_path):
    config = tiny_config()
    with config.unlocked():
        config.init_from = str(tmp_path / "none")
    with pytest.raises(WorkdirError, match="none holds no run"):
        train_and_evaluate(config, tmp_path / "run")
