"""Many runs: each trained once, by whichever process comes first, and a learning rate for each arm.

A *job* is a generator that yields the runs it needs, one after the other, is sent the record of
each, and returns what it has to say. `work` drives many of them. Any number of processes may call
it with the same jobs: a run that another process is training is left to that process, and a run
that was interrupted goes on from its checkpoint. So a sweep is spread over cores, or over machines
with a file system in common, by starting the same command several times.
"""

import contextlib
import copy
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from orthojax.console import tell
from orthojax.errors import DivergenceError, WorkdirBusyError, WorkdirError
from orthojax.storage.metrics import read_metrics
from orthojax.storage.workdir import check_config, write_json_atomic
from orthojax.training.train import train_and_evaluate

# Learning rates to choose from, two or three to a factor of ten.
LADDER = (1e-4, 2e-4, 5e-4, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

RECORD = "record.json"
POLL_SECONDS = 2.0  # between looks at what other processes are training
PROGRESS_SECONDS = 30.0  # between lines that tell of one run

Record = dict[str, Any]


class Run(NamedTuple):
    """A config and the directory that it is trained in."""

    workdir: pathlib.Path
    config: ConfigDict


Job = Generator[Run, Record, Any]


def train_once(run: Run, stream: Any = None) -> Record:
    """The record of a run, which is trained if it has none yet.

    Args:
      run: what to train, and where.
      stream: where progress is told, at the first record and every `PROGRESS_SECONDS`; None is
        nowhere.

    Returns:
      `test_accuracy`, on the whole test split, a fraction of one; `train_loss` and
      `train_accuracy`, the means over the last tenth of the steps; `seed`; `learning_rate`, and
      `rest_rate` if the optimizer has one for the rest; `steps`; `seconds`, of the last start;
      `cpu_seconds`, of the process, or None if there was more than one start; `diverged`, None or
      the message; and, where layers are observed, `orthonormality_error` when they last were. A run
      that diverged has accuracies of 0 and no finite `train_loss` (null in the file). `workdir` is
      the run's, and not in the file. What the run prints goes to a file beside its directory, of
      the same name and `.log`.

    Raises:
      WorkdirBusyError: another process is training it.
      WorkdirError: its directory holds the run of another config.
      UserError: see `orthojax.training.train.train_and_evaluate`.
    """
    path = run.workdir / RECORD
    if not path.exists():
        run.workdir.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, _train(run, stream))
    check_config(run.workdir, run.config)
    try:
        record = json.loads(path.read_bytes())
        if record["train_loss"] is None:
            record["train_loss"] = math.inf
        return {**record, "workdir": run.workdir}
    except (ValueError, TypeError, KeyError) as error:
        raise WorkdirError(
            f"{path} is damaged ({error}); remove it, and it is made of the trained run again"
        ) from error


def _train(run: Run, stream: Any) -> Record:
    log = run.workdir.with_name(run.workdir.name + ".log")
    record = {
        "seed": run.config.seed,
        "learning_rate": run.config.optimizer.learning_rate,
        "steps": run.config.steps,
        "diverged": None,
    }
    if "rest" in run.config.optimizer:
        record["rest_rate"] = run.config.optimizer.rest.learning_rate
    fresh, start = not run.workdir.exists(), time.process_time()
    told = -math.inf

    def progress(step: int, metrics: Record) -> None:
        nonlocal told
        if stream is not None and time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            done = f"step {step:,}/{run.config.steps:,}, loss {metrics['loss']:.3f}"
            tell(f"{_title(run)}: {done}", stream)

    with log.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        try:
            summary = train_and_evaluate(run.config, run.workdir, [progress])
        except DivergenceError as error:
            nothing = dict.fromkeys(("train_loss", "seconds", "cpu_seconds"))
            none_right = {"test_accuracy": 0.0, "train_accuracy": 0.0}
            return {**record, **nothing, **none_right, "diverged": str(error)}
    last = []
    for metrics in read_metrics(run.workdir):
        if metrics["kind"] == "train" and metrics["step"] > 0.9 * summary["steps"]:
            last.append(metrics)
        elif metrics["kind"] == "layers":
            record["orthonormality_error"] = metrics["orthonormality_error"]
    return {
        **record,
        "test_accuracy": summary["test_accuracy"],
        "train_loss": statistics.fmean(metrics["loss"] for metrics in last),
        "train_accuracy": statistics.fmean(metrics["accuracy"] for metrics in last),
        "seconds": summary["seconds"],
        "cpu_seconds": time.process_time() - start if fresh else None,
    }


def work(jobs: Mapping[str, Job], stream: Any = None) -> dict[str, Any]:
    """Drives jobs to their end, alone or beside other processes that do the same.

    Args:
      jobs: generators by name.
      stream: where progress is told, see `train_once`, and every run that ends; None is stderr.

    Returns:
      What each job returned, by name, in the order of `jobs`.
    """
    stream = stream or sys.stderr
    start = time.monotonic()
    results: dict[str, Any] = {}
    wanted: dict[str, Run] = {}

    def advance(name, record=None):
        try:
            wanted[name] = jobs[name].send(record)
        except StopIteration as end:
            wanted.pop(name, None)
            results[name] = end.value

    for name in jobs:
        advance(name)
    while wanted:
        progressed = False
        for name in list(wanted):
            run = wanted[name]
            fresh = not (run.workdir / RECORD).exists()
            try:
                record = train_once(run, stream)
            except WorkdirBusyError:
                continue
            progressed = True
            advance(name, record)
            if fresh:
                tell(
                    f"{len(results)}/{len(jobs)} done, {time.monotonic() - start:,.0f} s: "
                    f"{_title(run)}  {_outcome(record)}",
                    stream,
                )
        if wanted and not progressed:
            time.sleep(POLL_SECONDS)
    return {name: results[name] for name in jobs}


def finished(jobs: Mapping[str, Job]) -> dict[str, Any]:
    """What those of the jobs return whose runs all have their records; trains nothing."""
    results = {}
    for name, job in jobs.items():
        try:
            run = next(job)
            while (run.workdir / RECORD).exists():
                run = job.send(train_once(run))
        except StopIteration as stop:
            results[name] = stop.value
    return results


def plan(jobs: Mapping[Any, Job]) -> dict[Any, tuple[set[pathlib.Path], set[pathlib.Path]]]:
    """The runs that each job needs, those that are done and those that are left; trains nothing.

    A search for a learning rate is taken to end where it begins: it may need more.

    Args:
      jobs: are used up.

    Raises:
      WorkdirError: a run that is done is of another config.
    """
    found = {}
    for name, job in jobs.items():
        done, left = found[name] = set(), set()
        record = None
        with contextlib.suppress(StopIteration):
            while True:
                run = job.send(record)
                if (run.workdir / RECORD).exists():
                    done.add(run.workdir)
                    record = train_once(run)
                else:
                    left.add(run.workdir)
                    record = {"train_loss": len(left) * 1e300}  # worse than any, and than the last
    return found


def _title(run: Run) -> str:
    return f"{run.workdir.parent.name}/{run.workdir.name}"


def _outcome(record: Record) -> str:
    if record["diverged"]:
        return "diverged"
    return f"test {record['test_accuracy']:.1%}, training loss {record['train_loss']:.3f}"


def over_seeds(config: ConfigDict, directory: pathlib.Path, seeds: Sequence[int]) -> Job:
    """A job: the same config with each of the seeds; returns their records."""
    records = []
    for seed in seeds:
        records.append((yield run_at(config, directory, seed)))
    return records


def tuned(
    config: ConfigDict | Callable[[float], ConfigDict],
    directory: pathlib.Path,
    seeds: Sequence[int],
    *,
    start: float | None = None,
    rates: Sequence[float] = LADDER,
    search_steps: int | None = None,
) -> Job:
    """A job: the best learning rate for a config, then the config at that rate with every seed.

    The search climbs a ladder: from `start` to the neighbor with the smaller training loss, until
    both neighbors are worse, so that few of the rates are tried. The first seed searches; the
    test split has no say.

    Args:
      config: its seed and learning rate are replaced; or a function that makes it for a rate.
      directory: of the runs.
      seeds: at least one.
      start: one of the rates; None is that of the config.
      rates: the ladder, in ascending order.
      search_steps: length of the runs of the search; None is the whole length, and then the first
        seed is not trained again.

    Returns:
      The records at the best rate, one for each seed.
    """

    def at(rate):
        made = config(rate) if callable(config) else copy.deepcopy(config)
        made.optimizer.learning_rate = rate
        return made

    def run(rate):
        search = at(rate)
        search.steps = search_steps or search.steps
        return run_at(search, directory, seeds[0])

    best = yield from climb(run, start or config.optimizer.learning_rate, rates)
    return (yield from over_seeds(at(best), directory, seeds))


def climb(run: Callable[[float], Run], start: float, rates: Sequence[float] = LADDER) -> Job:
    """A job: the rate of a ladder with the smallest training loss, as `tuned` finds it.

    Args:
      run: of a rate.
      start: one of the rates.
      rates: the ladder, in ascending order.
    """
    losses: dict[int, float] = {}
    here = rates.index(start)
    while True:
        for index in (here, here - 1, here + 1):
            if 0 <= index < len(rates) and index not in losses:
                losses[index] = (yield run(rates[index]))["train_loss"]
        # Where all diverge or none learns it goes down: to the smallest of equals.
        best = min(losses, key=lambda index: (losses[index], index))
        if best == here:
            return rates[best]
        here = best


def run_at(config: ConfigDict, directory: pathlib.Path, seed: int) -> Run:
    """The run of a config with a seed, in a directory of its own within that of its arm.

    Example:
      >>> config = ConfigDict({"seed": 0, "steps": 600, "optimizer": {"learning_rate": 0.05}})
      >>> run_at(config, pathlib.Path("runs"), seed=1).workdir.as_posix()
      'runs/lr0.05-steps600-seed1'
    """
    config = copy.deepcopy(config)
    config.seed = seed
    name = f"lr{config.optimizer.learning_rate:g}-steps{config.steps}-seed{seed}"
    return Run(directory / name, config)
