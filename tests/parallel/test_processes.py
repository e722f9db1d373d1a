"""Several real processes on this machine: launch/local_processes.py, preempted and resumed."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

from orthojax.configs import digits_plain110
from orthojax.storage.metrics import read_metrics
from orthojax.training.train import train_and_evaluate

ROOT = pathlib.Path(__file__).parents[2]
# Devices are the launcher's to make.
XLA_FLAGS = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
SETTINGS = {"batch_size": 32, "log_every": 1, "eval_every": 10, "checkpoint_every": 5}


def tiny_config():
    config = digits_plain110.get_config("depth=8,steps=20")
    config.model.width, config.mesh.data = 4, 1
    config.update(SETTINGS)
    return config


def launch(program, workdir, *overrides, options=(), preempt=None):
    """Runs a launch program on the tiny config; after the line with `preempt` comes a SIGTERM."""
    command = [sys.executable, str(ROOT / "launch" / program), *options]
    command += ["--"] if program == "local_processes.py" else []
    command += [f"--config={ROOT / 'configs' / 'digits_plain110.py'}:depth=8,steps=20"]
    command += [f"--config.{key}={value}" for key, value in SETTINGS.items()]
    command += ["--config.model.width=4", f"--workdir={workdir}", *overrides]
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": XLA_FLAGS,
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if preempt and preempt in line:
            process.send_signal(signal.SIGTERM)
            preempt = None
    return process.wait(timeout=300), "".join(lines)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    train_and_evaluate(tiny_config(), workdir)
    return read_metrics(workdir)


def test_a_run_goes_on_with_other_processes_devices_and_meshes(undisturbed, tmp_path):
    """2 processes × 2 devices, then 1 × 1, then 1 × 4: as if nothing had happened."""
    workdir = tmp_path / "run"
    code, output = launch(
        "local_processes.py",
        workdir,
        *("--config.mesh.data=2", "--config.mesh.fsdp=2"),
        options=("--processes=2", "--devices-per-process=2"),
        preempt="step 5/20",
    )
    assert code == 128 + signal.SIGTERM, output
    assert "cpu x 4 of 2 processes" in output
    # Both agree on the step, and say so.
    assert output.count("SIGTERM: saved at step") == 2, output
    saved = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    first_stop = max(saved)
    assert 5 <= first_stop < 20
    assert {r["step"] for r in read_metrics(workdir)} == set(range(1, first_stop + 1))

    if first_stop < 16:  # on a busy machine the notice takes its time
        code, output = launch(
            "train.py", workdir, "--config.mesh.data=1", preempt=f"step {first_stop + 2}/20"
        )
        assert code == 128 + signal.SIGTERM, output
        assert f"from step {first_stop}" in output
        assert "cpu x 1;" in output

    code, output = launch(
        "local_processes.py",
        workdir,
        "--config.mesh.fsdp=4",
        options=("--processes=1", "--devices-per-process=4"),
    )
    assert code == 0, output
    assert "resuming" in output and "cpu x 4;" in output

    found = read_metrics(workdir)
    assert [(r["step"], r["kind"]) for r in found] == [(r["step"], r["kind"]) for r in undisturbed]
    for actual, expected in zip(found, undisturbed, strict=True):
        # Another batch, or another order within one, would differ in the first digit. Test
        # losses are sums over 360 images, which neither 4 devices nor batches of 32 divide.
        np.testing.assert_allclose(actual["loss"], expected["loss"], rtol=1e-3)
        assert abs(actual["accuracy"] - expected["accuracy"]) <= 1.5 / 32


def test_a_refusal_of_process_0_reaches_everybody(tmp_path):
    workdir = tmp_path / "occupied"
    workdir.mkdir()
    (workdir / "thesis.tex").write_text("not a run")
    code, output = launch("local_processes.py", workdir, options=("--processes=2",))
    assert code == 2, output
    assert "error: " in output and "holds no run" in output
    assert "[1] error: process 0 says: " in output
    assert [p.name for p in workdir.iterdir()] == ["thesis.tex"]
