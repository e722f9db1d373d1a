"""The validation split chooses the best checkpoint and ends training; the test split comes last."""

import json
import shutil

import pytest
from ml_collections import ConfigDict

import orthojax
from orthojax.storage.metrics import read_metrics
from orthojax.storage.saved import saved_steps
from orthojax.training.best import Best
from orthojax.training.train import train_and_evaluate
from tests.training.tiny import programs_shared, tiny_config

NET = "tests.training.test_own_net:Linear"


def config_of(patience=2, **changes):
    """At a rate so high that the first evaluation is the best of the first three."""
    config = tiny_config(40, eval_every=2, checkpoint_every=1, keep_checkpoints=1)
    config.model, config.optimizer.learning_rate = ConfigDict({"name": NET}), 1.0
    config.dataset.validation = 0.1
    with config.ignore_type():
        config.modulation = None
    config.update({"patience": patience, **changes})
    return config


@pytest.fixture(scope="module", autouse=True)
def shared():
    yield from programs_shared()


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "ended"
    return workdir, train_and_evaluate(config_of(), workdir)


@pytest.fixture
def copy(ended, tmp_path):
    return shutil.copytree(ended[0], tmp_path / "run")


def without_times(summary):
    times = {"seconds", "compile_seconds", "images_per_second", "resumed_from_step"}
    return {name: value for name, value in summary.items() if name not in times}


def test_patience_ends_training_and_the_best_stays(ended):
    workdir, summary = ended
    evaluated = [
        (record["step"], record["kind"], record["accuracy"])
        for record in read_metrics(workdir)
        if record["kind"] != "train"
    ]
    kinds = [(2, "validation"), (4, "validation"), (6, "validation"), (6, "test")]
    assert [found[:2] for found in evaluated] == kinds
    accuracies = [found[2] for found in evaluated]
    assert accuracies[0] > max(accuracies[1:3])
    assert (summary["steps"], summary["stopped_by_patience"]) == (6, 2)
    assert (summary["chosen_by"], summary["best_step"]) == ("validation", 2)
    assert summary["best_validation_accuracy"] == accuracies[0]
    assert summary["validation_accuracy"] == accuracies[2]
    assert summary["test_accuracy"] == accuracies[3]
    assert not [name for name in summary if name.startswith("best_test")]
    assert saved_steps(workdir / "checkpoints") == [2, 6]
    assert [orthojax.load_classifier(workdir, step, NET).step for step in ("best", "latest")] == [
        2,
        6,
    ]
    assert orthojax.load_classifier(workdir, own_net=NET).step == 6


def test_a_resumed_run_ends_where_an_undisturbed_one_does(ended, tmp_path):
    def stop(step, record):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_and_evaluate(config_of(log_every=1), tmp_path / "run", [stop])
    again = train_and_evaluate(config_of(log_every=1), tmp_path / "run")
    assert 0 < again["resumed_from_step"] < 5
    assert without_times(again) == without_times(ended[1])
    found, expected = (
        [record for record in read_metrics(workdir) if record["kind"] != "train"]
        for workdir in (tmp_path / "run", ended[0])
    )
    assert found == expected


def test_what_has_ended_ends_again_and_with_more_patience_goes_on(ended, copy):
    assert train_and_evaluate(config_of(), copy) == ended[1]
    (copy / "summary.json").unlink()
    before = (copy / "metrics.jsonl").read_bytes()
    again = train_and_evaluate(config_of(), copy)
    assert again["resumed_from_step"] == 6 and without_times(again) == without_times(ended[1])
    assert (copy / "metrics.jsonl").read_bytes() == before
    longer = train_and_evaluate(config_of(patience=3), copy)
    assert longer["resumed_from_step"] == 6 < longer["steps"]
    assert json.loads((copy / "summary-6.json").read_text())["stopped_by_patience"] == 2


def test_accuracies_of_other_statistics_are_not_compared():
    best = Best(2, 0.9, recalibrate_bn=0, since=3)
    assert best.after(Best(4, 0.9, recalibrate_bn=0)) == Best(2, 0.9, 0, since=4)
    assert best.after(Best(4, 0.1, recalibrate_bn=64)) == Best(4, 0.1, 64)
    assert best.exhausts(3, recalibrate_bn=0) and not best.exhausts(3, recalibrate_bn=64)
    assert not best.exhausts(4, recalibrate_bn=0) and not best.exhausts(None, recalibrate_bn=0)
