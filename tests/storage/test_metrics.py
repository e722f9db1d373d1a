"""Metrics as JSON lines across interruptions, the progress line, and the picture of curves."""

import errno
import io
import json
import math
import sys
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

from orthojax.console import tell
from orthojax.errors import UserError, WorkdirError
from orthojax.pictures.curves import draw_curves
from orthojax.storage.metrics import MetricWriter, read_metrics
from orthojax.training.progress import Progress


def write_steps(workdir, steps, resume_step=None):
    with MetricWriter(workdir, resume_step=resume_step) as writer:
        for step in steps:
            writer.write(step, "train", loss=np.float32(1) / np.float32(step), accuracy=0.1)
            writer.write(step, "test", accuracy=jnp.float32(0.3))


def test_each_record_is_in_the_file_at_once(tmp_path):
    writer = MetricWriter(tmp_path)
    writer.write(jnp.int32(7), "train", loss=jnp.bfloat16(0.5), images=np.int64(128))
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 7, "kind": "train", "loss": 0.5, "images": 128}
    writer.close()


def test_not_a_number_is_strict_json_and_comes_back(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, "train", loss=jnp.nan, norm=np.float32(np.inf), accuracy=0.5)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["loss"] is None
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"]) and math.isnan(record["norm"]) and record["accuracy"] == 0.5


@pytest.mark.parametrize("tail", [b"", b'{"step": 40, "kin'])
def test_resumed_file_equals_the_undisturbed_one(tmp_path, tail):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    write_steps(tmp_path / "a", range(10, 60, 10))
    write_steps(tmp_path / "b", range(10, 40, 10))
    with (tmp_path / "b" / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    write_steps(tmp_path / "b", range(30, 60, 10), resume_step=20)
    a, b = ((tmp_path / name / "metrics.jsonl").read_bytes() for name in "ab")
    assert a == b and a.count(b"\n") == 10


def test_a_run_from_the_beginning_starts_an_empty_file_and_keeps_the_earlier(tmp_path, capsys):
    for number, steps in enumerate([[10, 20], [30], [10]]):
        write_steps(tmp_path, steps)
        assert capsys.readouterr().err.count("metrics-") == min(number, 1)
    assert [record["step"] for record in read_metrics(tmp_path)] == [10, 10]
    kept = [(tmp_path / f"metrics-{n}.jsonl").read_text().count("\n") for n in (1, 2)]
    assert kept == [4, 2]


@pytest.mark.parametrize("line", ['{"step"', "null", "[]", '{"step": "b", "kind": 1}', "{}"])
def test_damage_in_the_middle_is_named_and_nothing_is_lost(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "kind": "train"}}\n{line}\n{{"step": 3, "kind": "train"}}\n')
    before = path.read_bytes()
    with pytest.raises(WorkdirError, match="line 2"):
        MetricWriter(tmp_path, resume_step=3)
    assert path.read_bytes() == before


def test_no_file_no_records(tmp_path):
    assert read_metrics(tmp_path) == []


def test_missing_tensorboard_names_the_extra(tmp_path, monkeypatch):
    write_steps(tmp_path, [10])
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"\[tensorboard\]"):
        MetricWriter(tmp_path, tensorboard=True)
    assert len(read_metrics(tmp_path)) == 2


def test_tensorboard_events_are_written(tmp_path):
    pytest.importorskip("tensorboardX")
    with MetricWriter(tmp_path, tensorboard=True) as writer:
        writer.write(1, "train", loss=0.5)
    assert any(path.stat().st_size for path in (tmp_path / "tensorboard").iterdir())


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def screen(self):
        """The lines that are left to see, with what \\r and blanks did to them."""
        lines = []
        for line in self.getvalue().split("\n"):
            cells = []
            for part in line.split("\r"):
                cells[: len(part)] = part
            lines.append("".join(cells).rstrip())
        return lines


def test_progress_is_plain_lines_in_a_file():
    stream = io.StringIO()
    with Progress(150, stream) as progress:
        progress.update(
            60, loss=1.0, train_accuracy=0.5, accuracies={"test": 0.4}, images_per_second=1e4
        )
        progress.message("saved")
        progress.update(120, loss=0.0314, train_accuracy=0.992, images_per_second=812.4)
    assert "\r" not in stream.getvalue()
    first, saved, second = stream.getvalue().splitlines()
    assert first.startswith("step 60/150  loss 1.000  train 50.0%  test 40.0%  10,000 images/s")
    assert saved == "saved"
    assert second.startswith("step 120/150  loss 0.031  train 99.2%  812 images/s")


def test_progress_rewrites_one_line_on_a_terminal():
    stream = Terminal()
    with Progress(150, stream) as progress:
        told = {"accuracies": {"validation": 0.3, "test": 0.4}, "images_per_second": 1}
        progress.update(60, loss=123456.7, train_accuracy=0, **told)
        progress.message("saved")
        assert stream.screen()[0] == "saved" and stream.screen()[1].startswith("step 60/150")
        progress.update(120, loss=1, train_accuracy=0.5, images_per_second=1)
        progress.update(121, loss=math.nan, train_accuracy=0, images_per_second=1)
    assert stream.screen()[0] == "saved"
    assert stream.screen()[1].startswith(
        "step 121/150  loss nan  train 0.0%  validation 30.0%  test 40.0%"
    )
    assert stream.screen()[2:] == [""]


def test_progress_reckons_the_time_left_without_compilation(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stream = io.StringIO()
    progress = Progress(5000, stream)
    clock[0] = 1000.0  # after compilation
    progress.begin(1000)
    for step, now in [(1100, 1010.0), (1200, 1012.0), (4900, 1086.0)]:
        clock[0] = now
        progress.update(step, loss=1, train_accuracy=0, images_per_second=1)
    left = [line.split("  ")[-1] for line in stream.getvalue().splitlines()]
    assert left == ["6:30 left", "1:16 left", "0:02 left"]
    clock[0] = 1010.0 + 3800 * 40
    progress.update(4900, loss=1, train_accuracy=0, images_per_second=1)
    assert stream.getvalue().endswith("  1:06:40 left\n")


class Gone(io.StringIO):
    """A terminal after its window was closed, or a pipe after its reader ended."""

    def write(self, text=""):
        raise OSError(errno.EIO, "Input/output error")

    isatty = flush = write


@pytest.mark.parametrize("stream", [Gone(), "closed", None])
def test_progress_survives_its_terminal(stream, monkeypatch):
    if stream == "closed":
        stream = io.StringIO()
        stream.close()
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it where it was closed at start
    with Progress(150, stream) as progress:
        progress.begin(0)
        progress.message("compiled")
        progress.update(60, loss=1, train_accuracy=0, images_per_second=1)
    tell("said to nobody", stream)


@pytest.mark.parametrize(
    ("encoding", "written"),
    [
        ("utf-8", "été 漢字 \\udcff"),
        ("cp1252", "été \\u6f22\\u5b57 \\udcff"),
        ("ascii", "\\xe9t\\xe9 \\u6f22\\u5b57 \\udcff"),
        ("utf-16", "été 漢字 \\udcff"),
    ],
)
def test_a_stream_gets_every_line_whatever_its_encoding(encoding, written):
    file = io.BytesIO()
    stream = io.TextIOWrapper(file, encoding)
    tell("été 漢字 \udcff", stream)  # the last is a byte of a file's name that is no UTF-8
    assert file.getvalue().decode(encoding) == f"{written}\n"


def test_a_stream_need_not_have_an_encoding():
    lines = []
    tell("été", mock.Mock(spec=["write", "flush"], write=lines.append))
    assert lines == ["été\n"]


@pytest.mark.parametrize("losses", [[2.3, 0.5, 0.01], [2.3, 2.2, 2.1], [math.nan] * 3])
def test_curves_are_drawn(tmp_path, losses):
    records = [
        {"step": step, "kind": kind, "loss": loss, "accuracy": 0.5}
        for step, loss in enumerate(losses)
        for kind in ("train", "test")
    ]
    draw_curves(records, tmp_path / "curves.png", title="a run")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
