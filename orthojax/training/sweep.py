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

RECORD = "record.json"
POLL_SECONDS = 2.0  # between looks at what other processes are training

Record = dict[str, Any]


class Run(NamedTuple):
    """A config and the directory that it is trained in."""

    workdir: pathlib.Path
    config: ConfigDict


Job = Generator[Run, Record, Any]


def train_once(run: Run) -> Record:
    """The record of a run, which is trained if it has none yet.

    Returns:
      `test_accuracy`, on the whole test split, a fraction of one; `train_loss`, the mean over the
      last tenth of the steps; `seed`; `learning_rate`; `steps`; `seconds`, of the last start;
      `diverged`, None or the message; and, where layers are observed, `orthonormality_error` when
      they last were. A run that diverged has the `test_accuracy` 0 and no finite
      `train_loss` (null in the file). What the run prints goes to a file
      beside its directory, of the same name and `.log`.

    Raises:
      WorkdirBusyError: another process is training it.
      WorkdirError: its directory holds the run of another config.
      UserError: see `orthojax.training.train.train_and_evaluate`.
    """
    path = run.workdir / RECORD
    if not path.exists():
        run.workdir.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, _train(run))
    check_config(run.workdir, run.config)
    try:
        record = json.loads(path.read_bytes())
        if record["train_loss"] is None:
            record["train_loss"] = math.inf
        return record
    except (ValueError, TypeError, KeyError) as error:
        raise WorkdirError(
            f"{path} is damaged ({error}); remove it, and it is made of the trained run again"
        ) from error


def _train(run: Run) -> Record:
    log = run.workdir.with_name(run.workdir.name + ".log")
    record = {
        "seed": run.config.seed,
        "learning_rate": run.config.optimizer.learning_rate,
        "steps": run.config.steps,
        "diverged": None,
    }
    with log.open("a") as file, contextlib.redirect_stderr(file):
        try:
            summary = train_and_evaluate(run.config, run.workdir)
        except DivergenceError as error:
            nothing = {"test_accuracy": 0.0, "train_loss": None, "seconds": None}
            return {**record, **nothing, "diverged": str(error)}
    losses = []
    for metrics in read_metrics(run.workdir):
        if metrics["kind"] == "train" and metrics["step"] > 0.9 * run.config.steps:
            losses.append(metrics["loss"])
        elif metrics["kind"] == "layers":
            record["orthonormality_error"] = metrics["orthonormality_error"]
    return {
        **record,
        "test_accuracy": summary["test_accuracy"],
        "train_loss": statistics.fmean(losses),
        "seconds": summary["seconds"],
    }


def work(jobs: Mapping[str, Job], stream: Any = None) -> dict[str, Any]:
    """Drives jobs to their end, alone or beside other processes that do the same.

    Args:
      jobs: generators by name.
      stream: where progress is told, a line for every run; None is stderr.

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
                record = train_once(run)
            except WorkdirBusyError:
                continue
            progressed = True
            advance(name, record)
            if fresh:
                tell(
                    f"{len(results)}/{len(jobs)} done, {time.monotonic() - start:,.0f} s: "
                    f"{run.workdir.parent.name}/{run.workdir.name}  {_outcome(record)}",
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


def _outcome(record: Record) -> str:
    if record["diverged"]:
        return "diverged"
    return f"test {record['test_accuracy']:.1%}, training loss {record['train_loss']:.3f}"


def over_seeds(config: ConfigDict, directory: pathlib.Path, seeds: Sequence[int]) -> Job:
    """A job: the same config with each of the seeds; returns their records."""
    records = []
    for seed in seeds:
        records.append((yield _run(config, directory, seed)))
    return records


def tuned(
    config: ConfigDict | Callable[[float], ConfigDict],
    directory: pathlib.Path,
    seeds: Sequence[int],
    *,
    rates: Sequence[float],
    start: float,
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
      rates: the ladder, in ascending order.
      start: one of them.
      search_steps: length of the runs of the search; None is the whole length, and then the first
        seed is not trained again.

    Returns:
      The records at the best rate, one for each seed.
    """

    def at(index):
        made = config(rates[index]) if callable(config) else copy.deepcopy(config)
        made.optimizer.learning_rate = rates[index]
        return made

    losses: dict[int, float] = {}
    here = rates.index(start)
    while True:
        for index in (here, here - 1, here + 1):
            if 0 <= index < len(rates) and index not in losses:
                search = at(index)
                search.steps = search_steps or search.steps
                losses[index] = (yield _run(search, directory, seeds[0]))["train_loss"]
        # Where all diverge or none learns it goes down: to the smallest of equals.
        best = min(losses, key=lambda index: (losses[index], index))
        if best == here:
            break
        here = best
    return (yield from over_seeds(at(here), directory, seeds))


def _run(config: ConfigDict, directory: pathlib.Path, seed: int) -> Run:
    config = copy.deepcopy(config)
    config.seed = seed
    return Run(directory / run_name(config.optimizer.learning_rate, config.steps, seed), config)


def run_name(learning_rate: float, steps: int, seed: int) -> str:
    """Of the directory of a run, within that of its arm.

    Example:
      >>> run_name(0.05, 600, seed=1)
      'lr0.05-steps600-seed1'
    """
    return f"lr{learning_rate:g}-steps{steps}-seed{seed}"
