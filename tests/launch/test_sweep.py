"""Sweeps: the search for a rate, resuming, divergence, and several processes at once."""

import io
import json
import math
import pathlib
import subprocess
import sys

import pytest

from orthojax.configs import digits_plain110
from orthojax.errors import DivergenceError, WorkdirBusyError, WorkdirError
from orthojax.experiments import sweep
from orthojax.storage.metrics import MetricWriter
from orthojax.storage.workdir import claim

ROOT = pathlib.Path(__file__).parents[2]
LADDER = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@pytest.fixture
def trained(monkeypatch):
    """Runs that cost nothing: their loss is that of `trained.loss(rate)`; NaN diverges."""

    class Trained(list):
        loss = staticmethod(lambda rate: abs(math.log(rate / 0.03)))

    runs = Trained()

    def train(config, workdir, callbacks=()):
        runs.append((config.optimizer.learning_rate, config.steps, config.seed))
        loss = runs.loss(config.optimizer.learning_rate)
        claim(workdir, config)
        if math.isnan(loss):
            raise DivergenceError("training diverged at step 3")
        with MetricWriter(workdir) as writer:
            for step in range(1, config.steps + 1):
                for callback in callbacks:
                    callback(step, {"loss": loss})
                # The mean over the last tenth is `loss`.
                late = step > 0.9 * config.steps
                writer.write(step, "train", loss=loss if late else 99.0, accuracy=float(late))
        return {"test_accuracy": 0.5, "steps": config.steps, "seconds": 1.0}

    monkeypatch.setattr(sweep, "train_and_evaluate", train)
    return runs


def config(steps=20):
    return digits_plain110.get_config(f"depth=8,steps={steps}")


def search(directory, start=0.1, **options):
    job = sweep.tuned(config(), directory, (0, 1, 2), rates=LADDER, start=start, **options)
    return sweep.work({"arm": job}, stream=io.StringIO())["arm"]


@pytest.mark.parametrize("start", [0.001, 0.03, 0.1, 1.0])
def test_the_search_finds_the_smallest_loss_and_trains_every_seed_there(trained, tmp_path, start):
    records = search(tmp_path, start)
    assert [record["seed"] for record in records] == [0, 1, 2]
    assert {record["learning_rate"] for record in records} == {0.03}
    assert len(trained) == len(set(trained))  # nothing twice
    tried = {rate for rate, _, _ in trained}
    assert {0.01, 0.03, 0.1} <= tried  # both neighbors were worse
    assert len(tried) <= abs(LADDER.index(start) - 3) + 3


def test_the_search_may_take_shorter_runs(trained, tmp_path):
    records = search(tmp_path, search_steps=5)
    assert {record["steps"] for record in records} == {20}
    assert sorted(seed for _, steps, seed in trained if steps == 20) == [0, 1, 2]
    assert {seed for _, steps, seed in trained if steps == 5} == {0}


def test_rates_that_diverge_are_worse_than_any_other(trained, tmp_path):
    trained.loss = lambda rate: math.nan if rate > 0.01 else 2.3
    records = search(tmp_path, 0.3)
    assert records[0]["learning_rate"] <= 0.01 and records[0]["diverged"] is None


def test_where_everything_diverges_the_smallest_rate_is_left(trained, tmp_path):
    trained.loss = lambda rate: math.nan
    records = search(tmp_path)
    assert {record["learning_rate"] for record in records} == {LADDER[0]}
    assert all("diverged at step 3" in record["diverged"] for record in records)
    assert all(record["test_accuracy"] == 0 for record in records)
    assert "Infinity" not in next(tmp_path.glob("*/record.json")).read_text()


def test_nothing_is_trained_twice(trained, tmp_path):
    first = search(tmp_path)
    count = len(trained)
    assert search(tmp_path) == first and len(trained) == count
    record = next(tmp_path.glob("*/record.json"))
    record.write_text(record.read_text()[:-20])
    with pytest.raises(WorkdirError, match=f"{record} is damaged"):
        search(tmp_path)


def test_what_was_trained_with_another_config_is_refused(trained, tmp_path):
    job = sweep.over_seeds(config(), tmp_path, (0,))
    sweep.work({"arm": job}, stream=io.StringIO())
    moved, other = config(), config()
    moved.dataset.data_dir, other.model.bn_bias = "elsewhere", 0.5
    sweep.work({"arm": sweep.over_seeds(moved, tmp_path, (0,))}, stream=io.StringIO())
    with pytest.raises(WorkdirError, match=r"model\.bn_bias: .* -> 0\.5"):
        sweep.work({"arm": sweep.over_seeds(other, tmp_path, (0,))}, stream=io.StringIO())
    assert len(trained) == 1


def test_what_another_process_trains_is_waited_for_and_others_go_first(
    trained, tmp_path, monkeypatch
):
    busy, train = ["a", "a"], sweep.train_and_evaluate

    def sometimes_busy(config, workdir, callbacks=()):
        if busy and workdir.parent.name == busy[0]:
            busy.pop()
            raise WorkdirBusyError("another process is training there")
        return train(config, workdir)

    monkeypatch.setattr(sweep, "train_and_evaluate", sometimes_busy)
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.0)
    jobs = {
        "a": sweep.over_seeds(config(), tmp_path / "a", (0,)),
        "b": sweep.over_seeds(config(), tmp_path / "b", (1,)),
    }
    results = sweep.work(jobs, stream=io.StringIO())
    assert [seed for _, _, seed in trained] == [1, 0] and not busy
    assert list(results) == ["a", "b"]


def short_jobs(directory):
    return {i: sweep.over_seeds(config(), directory / str(i), (0, 1)) for i in range(2)}


WORKER = """
import pathlib, sys, time
from orthojax.storage.metrics import MetricWriter
from orthojax.storage.workdir import claim
from orthojax.experiments import sweep
from tests.launch.test_sweep import short_jobs

def train(config, workdir, callbacks):
    claim(workdir, config)
    print(workdir, flush=True)
    time.sleep(0.5)
    with MetricWriter(workdir) as writer:
        writer.write(config.steps, "train", loss=1.0, accuracy=0.5)
    return {"test_accuracy": 0.5, "steps": config.steps, "seconds": 1.0}

sweep.train_and_evaluate = train
sweep.POLL_SECONDS = 0.1
results = sweep.work(short_jobs(pathlib.Path(sys.argv[1])))
print(sum(len(records) for records in results.values()))
"""


def test_two_processes_share_the_runs(trained, tmp_path, monkeypatch):
    """The other one holds each of its runs for a while; this one begins in the midst of one."""
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.1)
    command = [sys.executable, "-c", WORKER, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        begun = other.stdout.readline().strip()
        results = sweep.work(short_jobs(tmp_path), stream=io.StringIO())
        *more, count = other.communicate(timeout=60)[0].split()
    assert count == "4" and [len(records) for records in results.values()] == [2, 2]
    assert begun.startswith(str(tmp_path / "0"))
    starts = [json.loads(path.read_text()) for path in tmp_path.glob("*/*/environment.json")]
    assert len(starts) == 4 and all(len(entries) == 1 for entries in starts)
    assert len(more) < 3  # the other one did not train them all
    assert len(list(tmp_path.glob("*/*/record.json"))) == 4


def test_finished_reports_on_what_is_done_and_trains_nothing(trained, tmp_path):
    def jobs():
        return {
            name: sweep.tuned(config(), tmp_path / name, (0, 1), rates=LADDER, start=0.03)
            for name in ("done", "begun", "untouched")
        }

    done = sweep.work({"done": jobs()["done"]}, stream=io.StringIO())
    sweep.train_once(next(jobs()["begun"]))
    before = list(trained)
    assert sweep.finished(jobs()) == done
    assert trained == before


def test_a_long_run_is_told_of_before_it_ends(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "PROGRESS_SECONDS", 0.0)
    stream = io.StringIO()
    sweep.work({"arm": sweep.over_seeds(config(2), tmp_path / "arm", (0,))}, stream)
    *lines, last = stream.getvalue().splitlines()
    run = "arm/lr0.005-steps2-seed0"
    assert lines == [f"{run}: step {k}/2, loss {trained.loss(0.005):.3f}" for k in (1, 2)]
    assert last.startswith("1/1 done") and run in last


def test_the_plan_tells_what_is_done_and_left_and_trains_nothing(trained, tmp_path):
    def jobs():
        searched = {
            name: sweep.tuned(
                config(), tmp_path / name, (0, 1), rates=LADDER, start=0.1, search_steps=5
            )
            for name in ("done", "begun", "untouched")
        }
        return {**searched, "seeds": sweep.over_seeds(config(), tmp_path / "seeds", (0, 1, 2))}

    before = sweep.plan(jobs())
    assert {name: (len(done), len(left)) for name, (done, left) in before.items()} == {
        **dict.fromkeys(("done", "begun", "untouched"), (0, 3 + 2)),
        "seeds": (0, 3),
    }
    sweep.work({"done": jobs()["done"]}, stream=io.StringIO())
    sweep.train_once(next(jobs()["begun"]))
    count = len(trained)
    found = {name: (len(done), len(left)) for name, (done, left) in sweep.plan(jobs()).items()}
    assert found["done"] == (count - 1, 0) and found["untouched"] == (0, 5)
    assert found["begun"] == (1, 4) and len(trained) == count
