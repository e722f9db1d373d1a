"""kill -9 at random moments loses nothing. Minutes long: `pytest -m slow`, and this file."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest

from orthojax.configs import digits_plain110
from orthojax.storage.checkpoint import Checkpointer
from orthojax.storage.checksums import find_damage
from orthojax.storage.metrics import read_metrics
from orthojax.training.compiled import abstract_state
from orthojax.training.experiment import build
from tests.parallel.own_processes import ENVIRONMENT, ROOT

pytestmark = pytest.mark.slow

STEPS = 400


def config():
    made = digits_plain110.get_config(f"depth=8,steps={STEPS}")
    made.model.width, made.mesh.data, made.batch_size = 4, 1, 32
    made.log_every, made.eval_every, made.checkpoint_every = 5, 100, 1  # some save is under way
    return made


def command(program, workdir):
    flags = [f"--config={ROOT / 'configs' / 'digits_plain110.py'}:depth=8,steps={STEPS}"]
    flags += ["--config.model.width=4", "--config.mesh.data=1", "--config.batch_size=32"]
    flags += ["--config.log_every=5", "--config.eval_every=100", "--config.checkpoint_every=1"]
    return [sys.executable, str(ROOT / "launch" / program), *flags, f"--workdir={workdir}"]


def run(arguments, kill_after=None, mark="compiled in", victims=None):
    """Runs until the end, or until `kill_after` seconds after the first line with `mark`."""
    process = subprocess.Popen(
        arguments,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines, timer = [], None
    for line in process.stdout:
        lines.append(line)
        if kill_after is not None and timer is None and mark in line:

            def kill():
                for pid in victims(process) if victims else [process.pid]:
                    os.kill(pid, signal.SIGKILL)

            timer = threading.Timer(kill_after, kill)
            timer.start()
    if timer is not None:
        timer.join()
    return process.wait(timeout=300), "".join(lines)


def whole_checkpoints(workdir):
    """Steps of the checkpoints whose every byte is what was written."""
    found = (workdir / "checkpoints").glob("[0-9]*")
    names = [path for path in found if path.name.isdigit()]
    return {int(path.name) for path in names if not find_damage(path)}


def final_state(workdir):
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        return checkpointer.restore_latest(abstract_state(build(config()))).state


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """In a process of its own, as those that are killed: compiled as they are, to the same bits."""
    workdir = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, output = run(command("train.py", workdir))
    assert code == 0, output
    return workdir


def test_twenty_kills_at_random_moments_lose_nothing(undisturbed, tmp_path):
    random.seed(0)
    workdir, kills, resumed = tmp_path / "run", 0, []
    while kills < 20:
        before = whole_checkpoints(workdir) if workdir.exists() else set()
        code, output = run(command("train.py", workdir), random.uniform(0, 2))
        assert code in (-signal.SIGKILL, 0), output
        assert "corrupt" not in output, output
        if before:  # goes on from the newest whole checkpoint, and there are no others
            step = int(re.search(r"resuming .* from step (\d+)", output).group(1))
            assert step == max(before)
            resumed.append(step)
        if code == 0:
            break
        kills += 1
    print(f"\n{kills} kills; resumed from steps {resumed}")
    assert kills == 20, f"finished after {kills} kills: give it more steps"
    assert resumed == sorted(resumed) and len(set(resumed)) > 5
    code, output = run(command("train.py", workdir))
    assert code == 0, output
    leaves = zip(
        jax.tree.leaves(jax.device_get(final_state(workdir))),
        jax.tree.leaves(jax.device_get(final_state(undisturbed))),
        strict=True,
    )
    assert all(a.tobytes() == b.tobytes() for a, b in leaves)
    assert read_metrics(workdir) == read_metrics(undisturbed)


def test_a_process_that_is_killed_ends_the_run_and_the_next_goes_on(tmp_path):
    """Of two processes, either one dies; both are gone within seconds and nothing is lost."""
    workdir = tmp_path / "run"
    arguments = command("local_processes.py", workdir)
    arguments[2:2] = ["--processes=2", "--"]
    arguments.remove("--config.mesh.data=1")
    saved = 0
    for victim in (1, 0):

        def pids(process, victim=victim):
            children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
            return [int(children.split()[victim])]

        start = time.monotonic()
        code, output = run(arguments, kill_after=2.0, mark="  loss ", victims=pids)
        assert code not in (0, 2, 128 + signal.SIGTERM), output
        assert time.monotonic() - start < 120
        if saved:
            assert f"from step {saved}" in output
        assert max(whole_checkpoints(workdir)) > saved
        saved = max(whole_checkpoints(workdir))
