"""Checkpoints read beside whoever writes them, and nothing changed by it."""

import json
import shutil

import pytest

from orthojax.errors import WorkdirError
from orthojax.storage.checksums import write_checksums
from orthojax.storage.saved import POSITION, read_saved, saved_steps


def save(directory, step, best=None):
    checkpoint = directory / str(step)
    (checkpoint / "state").mkdir(parents=True)
    (checkpoint / "state" / "step").write_text(str(step))
    (checkpoint / POSITION).parent.mkdir()
    (checkpoint / POSITION).write_text(json.dumps({"best": best and {"step": best}}))
    write_checksums(checkpoint, ["state", "position"])


def read(checkpoint):
    return int((checkpoint / "state" / "step").read_text())


@pytest.fixture
def directory(tmp_path):
    for step, best in {2: 2, 4: 4, 6: 4, 8: 4}.items():
        save(tmp_path, step, best)
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
            save(directory, 10, best=4)
        if checkpoint.name == "4":
            save(directory, 12, best=12)
            (checkpoint / "state" / "step").unlink()
            shutil.rmtree(checkpoint)
        return read(checkpoint)

    assert read_saved(directory, "latest", removed) == (10, 10)
    assert read_saved(directory, "best", removed) == (12, 12)
    with pytest.raises(WorkdirError, match="no checkpoint of step 4"):
        read_saved(directory, 4, removed)


def test_what_names_the_best_may_be_damaged_or_name_what_is_gone(directory):
    before = sorted(directory.rglob("*"))
    (directory / "8" / POSITION).write_text('{"best": {"step": 6}}')
    with pytest.raises(WorkdirError, match=r"8 cannot be read: position.*\n.* 2, 4, 6"):
        read_saved(directory, "best", read)
    assert sorted(directory.rglob("*")) == before
    save(directory, 10, best=9)
    with pytest.raises(WorkdirError, match="no checkpoint of step 9 .*latest or one of 2, 4, 6"):
        read_saved(directory, "best", read)


def test_there_is_no_best_without_a_validation_split(directory):
    save(directory, 10)
    with pytest.raises(WorkdirError, match="is the best: .* by dataset.validation; choose latest"):
        read_saved(directory, "best", read)
    assert read_saved(directory, "latest", read) == (10, 10)


def test_whatever_reading_fails_with_is_told_of_the_checkpoint(directory):
    def fail(checkpoint):
        raise Exception("Encountered error while reading array index")

    with pytest.raises(WorkdirError, match="8 cannot be read: Encountered error"):
        read_saved(directory, 8, fail)
