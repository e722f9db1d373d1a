"""Checkpoints read beside whoever writes them, and nothing changed by it."""

import json
import shutil

import pytest

from orthojax.errors import WorkdirError
from orthojax.storage.checksums import write_checksums
from orthojax.storage.saved import METRICS, read_saved, saved_accuracy, saved_steps


def save(directory, step, accuracy=None):
    checkpoint = directory / str(step)
    (checkpoint / "state").mkdir(parents=True)
    (checkpoint / "state" / "step").write_text(str(step))
    if accuracy is not None:
        (checkpoint / METRICS).parent.mkdir()
        (checkpoint / METRICS).write_text(json.dumps({"test_accuracy": accuracy}))
    write_checksums(checkpoint, ["state", "metrics"])


def read(checkpoint):
    return int((checkpoint / "state" / "step").read_text())


@pytest.fixture
def directory(tmp_path):
    for step, accuracy in {2: 0.5, 4: 0.9, 6: 0.7, 8: None}.items():
        save(tmp_path, step, accuracy)
    return tmp_path


def test_which_step(directory):
    for name in ("10.orbax-checkpoint-tmp", "12.corrupt", "007", "²", "notes"):
        (directory / name).mkdir()
    assert saved_steps(directory) == [2, 4, 6, 8]
    assert saved_steps(directory / "none") == saved_steps(directory / "8/state/step") == []
    found = [read_saved(directory, step, read) for step in ("best", "latest", 6, "6")]
    assert found == [(4, 4), (8, 8), (6, 6), (6, 6)]
    with pytest.raises(WorkdirError, match="no checkpoint of step 5 .* one of 2, 4, 6, 8"):
        read_saved(directory, 5, read)
    with pytest.raises(WorkdirError, match="there is no checkpoint in"):
        read_saved(directory / "none", "best", read)


def test_what_is_removed_meanwhile_is_no_damage(directory):
    def removed(checkpoint):
        if checkpoint.name == "8":
            shutil.rmtree(checkpoint)
            save(directory, 10)
        if checkpoint.name == "4":
            (checkpoint / "state" / "step").unlink()
            shutil.rmtree(checkpoint)
        return read(checkpoint)

    assert read_saved(directory, "latest", removed) == (10, 10)
    assert read_saved(directory, "best", removed) == (6, 6)
    with pytest.raises(WorkdirError, match="no checkpoint of step 4"):
        read_saved(directory, 4, removed)


@pytest.mark.parametrize(
    "content", ["", "null", '{"test_accuracy": 0.1}', '{"test_accuracy": NaN}']
)
def test_metrics_that_are_damaged_are_not_passed_over(directory, content):
    before = sorted(directory.rglob("*"))
    (directory / "4" / METRICS).write_text(content)
    with pytest.raises(WorkdirError, match="metrics/metrics is damaged"):
        saved_accuracy(directory / "4")
    with pytest.raises(WorkdirError, match=r"4 cannot be read: metrics.*\n.* 2, 6, 8"):
        read_saved(directory, "best", read)
    assert read_saved(directory, "latest", read) == (8, 8)
    assert sorted(directory.rglob("*")) == before


def test_whatever_reading_fails_with_is_told_of_the_checkpoint(directory):
    def fail(checkpoint):
        raise Exception("Encountered error while reading array index")

    with pytest.raises(WorkdirError, match="8 cannot be read: Encountered error"):
        read_saved(directory, 8, fail)
