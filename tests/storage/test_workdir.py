"""A working directory belongs to one config, and to one process at a time."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import ml_collections
import pytest

from orthojax.config.sections import to_json
from orthojax.errors import WorkdirError
from orthojax.storage.workdir import (
    check_config,
    check_owned,
    check_workdir,
    claim,
    failures_explained,
    read_run_file,
    seal,
    write_json_atomic,
)

CONFIG = {"seed": 3, "optimizer": {"learning_rate": 0.1, "boundaries": (0.5, 0.75)}}


def test_a_new_directory_gets_config_and_environment(tmp_path):
    workdir = tmp_path / "runs" / "a"
    claim(workdir, ml_collections.ConfigDict(CONFIG))
    assert json.loads((workdir / "config.json").read_text()) == {
        "optimizer": {"boundaries": [0.5, 0.75], "learning_rate": 0.1},
        "seed": 3,
    }
    (environment,) = json.loads((workdir / "environment.json").read_text())
    assert environment["seed"] == 3
    assert environment["command"] == sys.argv
    assert environment["backend"] == "cpu" and environment["device_count"] >= 1
    assert {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"} <= set(
        environment["packages"]
    )


def test_the_same_config_resumes_and_its_environment_is_added(tmp_path):
    claim(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").touch()
    claim(tmp_path, CONFIG)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 2


def test_another_config_is_refused_with_every_difference(tmp_path):
    claim(tmp_path, CONFIG)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(WorkdirError) as error:
        claim(tmp_path, {"seed": 4, "optimizer": {"learning_rate": 0.05, "nesterov": True}})
    for line in [
        "seed: 3 -> 4",
        "optimizer.learning_rate: 0.1 -> 0.05",
        "optimizer.boundaries: [0.5, 0.75] removed",
        "optimizer.nesterov: True added",
        "another --workdir",
    ]:
        assert line in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_somebody_elses_directory_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(WorkdirError, match=r"not empty.*no config\.json"):
        claim(tmp_path, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("below", ["file", "file/run"])
def test_a_file_in_its_place_is_refused(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(WorkdirError, match="is a file"):
        claim(tmp_path / below, CONFIG)


def test_what_a_kill_during_the_first_claim_leaves_is_no_obstacle(tmp_path):
    (tmp_path / "lock").touch()
    (tmp_path / ".0123456789abcdef.tmp").write_text('{"se')
    claim(tmp_path, CONFIG)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 3


@pytest.mark.parametrize("name", ["run[1]", "run*", "file/run", "a" * 256])
def test_no_place_for_a_run_is_refused_and_nothing_is_made(tmp_path, name):
    (tmp_path / "file").touch()
    for refuse in (check_workdir, lambda workdir: claim(workdir, CONFIG)):
        with pytest.raises(WorkdirError, match="another|choose a --workdir"):
            refuse(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    check_workdir(tmp_path / "a" / "b")


def test_a_link_out_of_the_run_is_not_written_through(tmp_path):
    claim(tmp_path / "run", CONFIG)
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "run" / "metrics.jsonl").symlink_to(tmp_path / "mine")
    with pytest.raises(WorkdirError, match=r"metrics\.jsonl is a link that leads out"):
        claim(tmp_path / "run", CONFIG)


def test_a_run_that_was_removed_or_replaced_is_no_longer_owned(tmp_path):
    run = tmp_path / "run"
    claim(run, CONFIG)
    check_owned(run)
    shutil.rmtree(run)
    for _ in range(2):
        with pytest.raises(WorkdirError, match="was removed while it was trained"):
            check_owned(run)
        with pytest.raises(WorkdirError, match="was removed"), failures_explained(run):
            (run / "none" / "a").write_text("")
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "lock").touch()  # as another process would


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_a_permanent_refusal_is_the_users_and_another_is_not(tmp_path, number):
    claim(tmp_path, CONFIG)
    with pytest.raises(WorkdirError, match="run the same command"), failures_explained(tmp_path):
        raise OSError(number, os.strerror(number), str(tmp_path / "checkpoints"))
    for other in (errno.ESTALE, errno.ETIMEDOUT):  # which another start may mend
        with pytest.raises(OSError), failures_explained(tmp_path):
            raise OSError(other, os.strerror(other), str(tmp_path / "checkpoints"))
    with pytest.raises(OSError), failures_explained(tmp_path):
        raise (
            OSError(number, os.strerror(number), "/elsewhere")
            if number != errno.ENOSPC
            else OSError
        )


def test_what_a_run_consists_of_is_read_only_as_it_was_written(tmp_path):
    claim(tmp_path, CONFIG)
    write_json_atomic(tmp_path / "summary.json", {"steps": 3})
    seal(tmp_path, "config.json")
    for name in ("config.json", "summary.json"):
        whole = (tmp_path / name).read_text()
        assert read_run_file(tmp_path, name) == json.loads(whole)
        (tmp_path / name).write_text(whole.replace("3", "4"))
        seal(tmp_path)  # does not make it right
        with pytest.raises(WorkdirError, match=f"{name} is damaged"):
            read_run_file(tmp_path, name)
        (tmp_path / name).write_text(whole)
        seal(tmp_path, name)
    (tmp_path / "checksums.json").unlink()  # as in a run from before it was kept
    assert read_run_file(tmp_path, "summary.json") == {"steps": 3}


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed"')
    with pytest.raises(WorkdirError, match=r"config\.json is damaged"):
        claim(tmp_path, CONFIG)


@pytest.mark.parametrize("content", ["", '[{"seed"', '{"seed": 1}', "null", "\0\0"])
def test_a_damaged_environment_is_set_aside(tmp_path, content, capsys):
    claim(tmp_path, CONFIG)
    (tmp_path / "environment.json").write_text(content)
    claim(tmp_path, CONFIG)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1
    assert (tmp_path / "environment.json.corrupt").read_text() == content
    assert "environment.json is damaged; it is kept as" in capsys.readouterr().err


@pytest.mark.parametrize(
    "changed",
    [
        {"log_every": 5},
        {"eval_every": 7, "checkpoint_every": 9, "observe_every": 1},
        {"keep_checkpoints": 1, "tensorboard": True},
        {"mesh": {"data": 2}, "dataset": {"data_dir": "/data", "cache_dir": "/c", "workers": 3}},
    ],
)
def test_what_results_do_not_depend_on_may_differ(tmp_path, changed):
    claim(tmp_path, CONFIG)
    claim(tmp_path, CONFIG | changed)
    check_config(tmp_path, CONFIG)
    assert json.loads((tmp_path / "config.json").read_text()).items() >= changed.items()


def test_a_run_may_become_longer_and_never_shorter_than_it_is(tmp_path, capsys):
    claim(tmp_path, CONFIG | {"steps": 100})
    for step in ("20", "40", "60.corrupt"):
        (tmp_path / "checkpoints" / step).mkdir(parents=True)
    for steps in (200, 40):
        claim(tmp_path, CONFIG | {"steps": steps})
        assert f"{steps} now" in capsys.readouterr().err
    with pytest.raises(WorkdirError, match="of step 40, and steps=39 is less"):
        claim(tmp_path, CONFIG | {"steps": 39})
    with pytest.raises(WorkdirError, match="steps: 40 -> 100"):  # the record of another run
        check_config(tmp_path, CONFIG | {"steps": 100})


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, number, capsys):
    def flock(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    claim(tmp_path, CONFIG)
    assert "cannot be locked" in capsys.readouterr().err
    claim(tmp_path, CONFIG)
    assert not capsys.readouterr().err  # once


def test_a_platform_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("orthojax.storage.workdir.fcntl", None)
    claim(tmp_path, CONFIG)
    assert "cannot be locked" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lock", "environment.json", "config.json"])
def test_a_directory_in_the_place_of_a_file_is_named(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(to_json(CONFIG)))
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()
    with pytest.raises(WorkdirError, match=name), failures_explained(tmp_path):
        claim(tmp_path, CONFIG)


def test_a_directory_is_locked_while_its_process_lives(tmp_path):
    code = (
        "import json, os, pathlib, sys, time\n"
        "from orthojax.storage.workdir import claim\n"
        "claim(pathlib.Path(sys.argv[1]), json.loads(sys.argv[2]))\n"
        # A data worker that outlives the killed process must not hold the lock.
        "worker = os.fork()\n"
        "if worker: print(worker, flush=True)\n"
        "time.sleep(60)"
    )
    other = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(tmp_path), json.dumps(CONFIG)],
        stdout=subprocess.PIPE,
        text=True,
    )
    worker = int(other.stdout.readline())
    try:
        with pytest.raises(WorkdirError, match="another process is training"):
            claim(tmp_path, CONFIG)
        other.kill()
        other.wait()
        os.kill(worker, 0)
        claim(tmp_path, CONFIG)
    finally:
        other.kill()
        os.kill(worker, signal.SIGKILL)
        other.wait()
        other.stdout.close()
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 2


def test_json_is_there_as_a_whole_or_not_at_all(tmp_path):
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"b": 1, "a": [None, True]})
    assert path.read_text() == '{\n  "a": [\n    null,\n    true\n  ],\n  "b": 1\n}\n'
    with pytest.raises(ValueError):
        write_json_atomic(path, {"a": float("nan")})
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]
    assert json.loads(path.read_text())["b"] == 1
