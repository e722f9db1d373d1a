"""Several real processes on this machine: launch/local_processes.py, preempted and resumed."""

import pathlib
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest

from orthojax.errors import ConfigError
from orthojax.parallel.processes import is_first
from orthojax.storage.metrics import read_metrics
from orthojax.training.train import train_and_evaluate
from tests.parallel import small_config
from tests.parallel.own_processes import ENVIRONMENT, ROOT


def launch(workdir, *overrides, devices, preempt=None):
    """The small config on two processes; after the line with `preempt` comes a SIGTERM."""
    command = [sys.executable, str(ROOT / "launch" / "local_processes.py"), "--processes=2"]
    command += [f"--devices-per-process={devices}", "--"]
    command += [f"--config={small_config.__file__}", f"--workdir={workdir}", *overrides]
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if preempt and preempt in line:
            process.send_signal(signal.SIGTERM)
            preempt = None
    return process.wait(timeout=300), "".join(lines)


def test_a_run_goes_on_with_other_processes_devices_and_meshes(tmp_path, capsys):
    """2 processes × 2 devices, then 1 × 1: as if nothing had happened."""
    train_and_evaluate(small_config.get_config(), tmp_path / "undisturbed")
    undisturbed = read_metrics(tmp_path / "undisturbed")
    workdir = tmp_path / "run"
    meshes = ("--config.mesh.data=2", "--config.mesh.fsdp=2")
    code, output = launch(workdir, *meshes, devices=2, preempt="step 5/20")
    assert code == 128 + signal.SIGTERM, output
    assert "cpu x 4 of 2 processes" in output
    # Both agree on the step, and say so.
    assert output.count("SIGTERM: saved at step") == 2, output
    saved = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert 5 <= max(saved) < 20
    assert {r["step"] for r in read_metrics(workdir)} == set(range(1, max(saved) + 1))

    capsys.readouterr()
    train_and_evaluate(small_config.get_config(), workdir)
    assert f"from step {max(saved)}" in "".join(capsys.readouterr())
    found = read_metrics(workdir)
    assert [(r["step"], r["kind"]) for r in found] == [(r["step"], r["kind"]) for r in undisturbed]
    for actual, expected in zip(found, undisturbed, strict=True):
        # Another batch, or another order within one, would differ in the first digit. Test
        # losses are sums over 360 images, which batches of 32 do not divide.
        np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-3)
        assert abs(actual["accuracy"] - expected["accuracy"]) <= 1.5 / 32


@pytest.fixture
def stand_in(tmp_path):
    """Starts launch/local_processes.py with another program instead of train.py."""
    shutil.copy(ROOT / "launch" / "local_processes.py", tmp_path)

    def start(program):
        (tmp_path / "train.py").write_text(program)
        command = [sys.executable, tmp_path / "local_processes.py", "--processes=2"]
        environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)

    return start


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children")
def test_children_end_when_the_launcher_is_killed(stand_in):
    program = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    process = stand_in(program)
    children = [int(process.stdout.readline().split()[-1]) for _ in range(2)]
    process.kill()
    deadline = time.monotonic() + 10
    while any(pathlib.Path("/proc", str(child)).exists() for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.communicate()


def test_output_passes_as_it_is_in_any_encoding(stand_in):
    program = r"import sys; sys.stdout.buffer.write(b'\xc3\xa9t\xe9\n' + b'step\n' * 20_000)"
    process = stand_in(program)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = out.splitlines()
    assert lines.count(b"\xc3\xa9t\xe9") == lines.count(b"[1] \xc3\xa9t\xe9") == 1
    assert lines.count(b"step") == lines.count(b"[1] step") == 20_000


def test_a_platform_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr("jax.devices", mock.Mock(side_effect=AssertionError))
    with pytest.raises(ConfigError, match="no device of JAX_PLATFORMS=.*pip install"):
        is_first()


def test_a_refusal_of_process_0_reaches_everybody(tmp_path):
    workdir = tmp_path / "occupied"
    workdir.mkdir()
    (workdir / "thesis.tex").write_text("not a run")
    code, output = launch(workdir, "--config.mesh.data=2", devices=1)
    assert code == 2, output
    assert "error: " in output and "holds no run" in output
    assert "[1] error: process 0 says: " in output
    assert [p.name for p in workdir.iterdir()] == ["thesis.tex"]
