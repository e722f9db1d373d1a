"""Working directories in an object store, played by one in memory; orbax's part is not in here."""

import importlib.util
import json
import os
import pathlib
import threading

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from orthojax.data.in_memory import load
from orthojax.errors import DatasetError, MissingExtraError, UserError, WorkdirError
from orthojax.pictures.curves import draw_curves
from orthojax.storage.checksums import find_damage, write_checksums
from orthojax.storage.metrics import MetricWriter, read_metrics
from orthojax.storage.paths import (
    check_output,
    foreign,
    inside,
    is_remote,
    name_fault,
    output_directory,
    to_path,
    write_atomic,
)
from orthojax.storage.workdir import claim, read_run_file, seal, write_json_atomic

CONFIG = {"seed": 0, "optimizer": {"learning_rate": 0.1}, "mesh": {"data": 1}}


class Bucket(MemoryFileSystem):
    """Objects in memory, under names that begin with gs://."""

    protocol = ("gs", "gcs")
    store: dict = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("gs://", "memory://"))


@pytest.fixture
def bucket(monkeypatch):
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    for name in ("gcs", "gs"):
        monkeypatch.setitem(_registry, name, Bucket)
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    # The extra is not needed for a bucket in memory.
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name == "gcsfs" or find_spec(name)
    )
    yield "gs://bucket/runs"
    monkeypatch.undo()  # before the backend is asked anew by the tests of other modules
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()


def test_a_run_is_claimed_resumed_and_refused_as_in_a_directory(bucket):
    workdir = to_path(f"{bucket}/a")
    claim(workdir, CONFIG)
    assert json.loads((workdir / "config.json").read_text()) == CONFIG
    claim(workdir, {**CONFIG, "mesh": {"data": 8}})  # another mesh may go on
    assert len(json.loads((workdir / "environment.json").read_text())) == 2
    with pytest.raises(WorkdirError, match="seed: 0 -> 1"):
        claim(workdir, {**CONFIG, "seed": 1})
    (to_path(f"{bucket}/b") / "thesis.tex").write_text("not a run")
    with pytest.raises(WorkdirError, match="holds no run"):
        claim(to_path(f"{bucket}/b"), CONFIG)


def test_metrics_are_there_after_every_record_and_trimmed_on_resume(bucket):
    for step, resume in ((1, None), (5, 2), (9, 5)):
        with MetricWriter(bucket, resume_step=resume) as writer:
            for later in range(step, step + 4):
                writer.write(later, "train", loss=1.0 / later)
                assert read_metrics(bucket)[-1]["step"] == later
        steps = [record["step"] for record in read_metrics(bucket)]
        assert steps == sorted(set(steps))
    assert steps == [1, 2, 5, 9, 10, 11, 12]


def test_what_a_run_consists_of_has_checksums_there_too(bucket):
    run = to_path(bucket)
    write_json_atomic(run / "config.json", {"seed": 0})
    seal(run, "config.json")
    assert read_run_file(run, "config.json") == {"seed": 0}
    write_json_atomic(run / "config.json", {"seed": 1})
    with pytest.raises(WorkdirError, match=r"config\.json is damaged"):
        read_run_file(run, "config.json")


def test_pictures_and_json_arrive_whole(bucket):
    write_json_atomic(f"{bucket}/summary.json", {"steps": 3})
    assert json.loads(to_path(f"{bucket}/summary.json").read_text()) == {"steps": 3}
    records = [{"step": s, "kind": "train", "loss": 1 / s, "accuracy": 0.5} for s in (1, 2)]
    draw_curves(records, f"{bucket}/curves.png")
    assert to_path(f"{bucket}/curves.png").read_bytes().startswith(b"\x89PNG")


def test_paths_of_this_machine_stay_what_they_are(tmp_path):
    assert not is_remote(tmp_path) and is_remote("gs://bucket/run")
    write_atomic(tmp_path / "a", b"1")
    write_atomic(str(tmp_path / "a"), b"2")
    assert (tmp_path / "a").read_bytes() == b"2"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_of_two_writers_one_has_written_the_whole_file(tmp_path):
    file = tmp_path / "summary.json"
    contents = [bytes([letter]) * 20_000 for letter in b"ab"]
    write_atomic(file, contents[0])
    writers = [
        threading.Thread(target=lambda c=content: [write_atomic(file, c) for _ in range(30)])
        for content in contents
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert file.read_bytes() in contents
    assert file.read_bytes() in contents and [p.name for p in tmp_path.iterdir()] == [file.name]


def test_a_link_and_a_pipe_stay_what_they_are(tmp_path):
    (tmp_path / "there").write_bytes(b"0")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write_atomic(tmp_path / "link", b"1")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_bytes() == b"1"
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    write_atomic(pipe, b"2")
    reader.join()
    assert pipe.is_fifo() and read == [b"2"]


@pytest.mark.parametrize("name", ["", ".", "none/a.png", "file/a.png", "a" * 256, "a\0b", "loop"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="cannot be written|no file to write to"):
        check_output(name)
    if name not in ("", "."):
        with pytest.raises(UserError, match="no directory that can be written to"):
            output_directory("file/a.png" if name == "none/a.png" else name)
    for good in ("new.png", "file", "/dev/null"):
        check_output(good)
    assert output_directory("a/b", "c.json").is_dir()
    with pytest.raises(UserError, match="no file to write to"):
        output_directory("a", "b")
    (tmp_path / "a" / "b").rmdir(), (tmp_path / "a").rmdir()
    assert sorted(tmp_path.iterdir()) == before


def test_names_below_which_nothing_could_be_read_again():
    for name in ("a[1]", "a*/b", "a?", "a\\b", os.fsdecode(b"a\xff"), "gs://bucket/a[1]"):
        assert "could not be read again" in name_fault(name), name
    for name in ("a]", "a b", "ü", "50%", "a:b", "a=b,c", "gs://bucket/a", "."):
        assert name_fault(name) is None, name


def test_nothing_of_a_directory_is_outside_of_it(tmp_path):
    run, secret = tmp_path / "run", tmp_path / "secret"
    (run / "state").mkdir(parents=True)
    secret.write_text("mine")
    (run / "state" / "kernel").write_text("1.0")
    (run / "alias").symlink_to(run / "state" / "kernel")
    write_checksums(run, ["state"])
    assert foreign(run) is None and find_damage(run) is None
    names = [str(secret), "../secret", "state/../../secret", "link", "."]
    (run / "link").symlink_to(secret)
    for name in names:
        with pytest.raises(WorkdirError, match=r"leads out|is no file"):
            inside(run, name)
        (run / "checksums.json").write_text(json.dumps({name: "0"}))
        assert "leads out" in find_damage(run) or "is no file" in find_damage(run)
    assert f"{run / 'link'} is a link that leads out" in foreign(run)
    (run / "link").unlink()
    os.mkfifo(run / "state" / "pipe")  # which whoever opens it waits for
    assert "pipe is no file" in foreign(run)
    assert pathlib.Path(inside(run, "state/kernel")).read_text() == "1.0"


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(WorkdirError, match="s3://bucket.*only gs://"):
        to_path("s3://bucket/run")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"gs://bucket/run needs gcsfs: pip install .*\[gcs\]"
    ):
        to_path("gs://bucket/run")


def test_bundled_data_are_not_prepared_in_a_bucket(bucket, tmp_path):
    with pytest.raises(DatasetError, match="cannot write digits to gs://bucket/runs/.*data_dir"):
        load("digits", bucket, cache_dir=str(tmp_path))
