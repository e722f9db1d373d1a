"""`train_and_evaluate`: a config and a working directory in, a trained net and its record out."""

import collections
import contextlib
import json
import math
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from orthojax import data
from orthojax.analysis.curves import draw_curves
from orthojax.console import tell
from orthojax.data import preprocessing
from orthojax.errors import DivergenceError
from orthojax.parallel.mesh import replicated
from orthojax.parallel.processes import is_first, on_first_process
from orthojax.sites import weights_only
from orthojax.storage.checkpoint import Checkpointer, saved_steps
from orthojax.storage.checksums import find_damage
from orthojax.storage.metrics import MetricWriter, NullWriter, read_metrics
from orthojax.storage.paths import is_remote, to_path
from orthojax.storage.workdir import claim, failures_explained, write_json_atomic
from orthojax.training.compiled import CompiledSteps, compile_steps
from orthojax.training.experiment import Experiment, build
from orthojax.training.interrupt import Interrupted, StopRequest, stop_on_signals
from orthojax.training.net import description
from orthojax.training.observe import observe
from orthojax.training.progress import Progress
from orthojax.training.state import TrainState
from orthojax.training.trained import read_trained
from orthojax.training.transfer import take_over

SUMMARY = "summary.json"
STEPS_AHEAD = 2  # that the host may have begun and the devices not finished


Callback = Callable[[int, dict[str, float]], None]


def train_and_evaluate(
    config: Mapping, workdir: str | pathlib.Path, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Trains what `config` describes in `workdir`, or goes on where a run there stopped.

    A run that has finished is left as it is, and its summary is returned. Several processes (see
    `orthojax.parallel.processes.initialize`) call it alike, with a `workdir` that all of them see;
    a run may go on with another number of processes or devices than before.
    Writes `config.json`, `environment.json`, `preprocessing.json`, `metrics.jsonl`,
    `checkpoints/`, `summary.json` and `curves.png` into `workdir`, and progress to stderr; of
    several processes the first one does. `orthojax.load(workdir)` is the trained net.

    Args:
      config: a Mapping or ConfigDict with the keys of `orthojax.training.experiment.Settings`.
      workdir: a directory of this run's own, or `gs://…`; created when missing.
      callbacks: each is called with the step and a record, when one is written: means of `loss`,
        `accuracy`, `grad_norm`, `param_norm` since the last, `learning_rate`, and `test_accuracy`
        where the net has been evaluated. What one raises ends the training; what was saved stays.

    Returns:
      What `summary.json` holds: `test_accuracy`, `test_top5_accuracy` (the label is among the five
      largest logits) and `test_loss` on the whole test split, `best_test_accuracy` and `best_step`
      of the best checkpoint, which is kept, `steps`, `seconds` (of this call), `compile_seconds`,
      `images_per_second` (while training; null if nothing was left to train), `parameters` (their
      number) and `resumed_from_step`.

    Raises:
      UserError: see `build`, `orthojax.storage.workdir.claim` and
        `orthojax.storage.checkpoint.Checkpointer`.
      DivergenceError: the loss or a parameter is no longer finite. The last checkpoint, saved
        while they were, is kept.
      Interrupted: SIGINT, SIGTERM or SIGHUP, in whichever process; the state has been saved.
    """
    workdir = to_path(workdir)
    experiment = build(config)
    with failures_explained(workdir):
        on_first_process(lambda: _claim(workdir, config, experiment.dataset))
        summary = _finished(workdir, experiment.settings.steps)
        return summary or _train(experiment, workdir, callbacks)


def _claim(workdir: Any, config: Mapping, dataset: data.Dataset) -> None:
    claim(workdir, config)
    write_json_atomic(workdir / preprocessing.FILE, dataset.preprocessing.to_json())


def _finished(workdir: Any, steps: int) -> dict[str, Any] | None:
    """The summary of the run in `workdir` if it has taken all its steps, else None."""
    try:
        summary = json.loads((workdir / SUMMARY).read_bytes())
        finished = summary["steps"] == steps and "test_accuracy" in summary
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    saved = saved_steps(workdir / "checkpoints")
    if not finished or (saved and saved[-1] < steps):
        return None
    if saved and not is_remote(workdir) and find_damage(workdir / "checkpoints" / str(saved[-1])):
        return None  # trains again from an earlier checkpoint
    gone = "" if saved else "; its checkpoints are gone"
    if is_first():
        tell(f"{workdir} has finished its {steps:,} steps{gone}; to train anew choose another")
    return summary


def _train(experiment: Experiment, workdir: Any, callbacks: Sequence[Callback]) -> dict[str, Any]:
    start = time.monotonic()
    settings = experiment.settings
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(
            Checkpointer(workdir / "checkpoints", keep=settings.keep_checkpoints)
        )
        stream = sys.stderr if is_first() else stack.enter_context(open(os.devnull, "w"))
        progress = stack.enter_context(Progress(settings.steps, stream))
        progress.message(_describe(experiment))
        source = None
        if settings.init_from is not None and checkpointer.latest_step() is None:
            source = read_trained(settings.init_from)
        programs = compile_steps(experiment)
        progress.message(f"compiled in {programs.compile_seconds:.1f} s")
        batches = experiment.dataset.train_batches(
            settings.batch_size, settings.seed, programs.rows
        )
        stack.callback(batches.close)

        restored = checkpointer.restore_latest(programs.abstract_state)
        if restored is None:
            first_step, state = 0, programs.init()
            if source is not None:
                names = experiment.dataset.preprocessing.class_names
                state, told = take_over(state, source, names)
                progress.message(f"begins as step {source.step} of {settings.init_from}: {told}")
        else:
            first_step, state = restored.step, restored.state
            batches.set_state(restored.data_state)
            progress.message(f"resuming {workdir} from step {first_step}")
        writer = NullWriter()
        if is_first():
            resume_step = first_step if restored else None
            writer = MetricWriter(workdir, settings.tensorboard, resume_step)
        stack.enter_context(writer)
        # From here on there is something to save.
        request = stack.enter_context(stop_on_signals())
        trainer = _Trainer(experiment, programs, checkpointer, writer, progress, request, callbacks)
        state = trainer.train(state, batches, first_step)
        test = trainer.test or evaluate(experiment, programs, state)
        best_step, best_test_accuracy = checkpointer.best() or (None, None)
    summary = {
        "test_accuracy": test["accuracy"],
        "test_top5_accuracy": test["top5_accuracy"],
        "test_loss": test["loss"] if math.isfinite(test["loss"]) else None,
        "best_test_accuracy": best_test_accuracy,
        "best_step": best_step,
        "steps": settings.steps,
        "seconds": round(time.monotonic() - start, 2),
        "compile_seconds": round(programs.compile_seconds, 2),
        "images_per_second": trainer.images_per_second(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights_only(state.params))),
        "resumed_from_step": first_step,
    }
    if is_first():
        _draw(workdir)
        _keep_earlier_summary(workdir / SUMMARY)
        write_json_atomic(workdir / SUMMARY, summary)  # last: it says that the run has finished
    return summary


def _draw(workdir: Any) -> None:
    try:
        draw_curves(read_metrics(workdir), workdir / "curves.png", title=workdir.name)
    except Exception as error:  # whatever is wrong with matplotlib, the training is done
        tell(f"curves.png is not drawn: {type(error).__name__}: {error}")


def _keep_earlier_summary(path: Any) -> None:
    """Renames the summary of a run that was shorter, `summary-300.json` for 300 steps."""
    try:
        steps = int(json.loads(path.read_bytes())["steps"])
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return
    path.rename(path.with_name(f"summary-{steps}.json"))


def evaluate(
    experiment: Experiment, programs: CompiledSteps, state: TrainState
) -> dict[str, float]:
    """Mean loss and accuracies over the whole test split, every image exactly once."""
    state = programs.recalibrate(state)
    totals = {"loss": 0.0, "correct": 0.0, "correct_top5": 0.0, "count": 0.0}
    batches = experiment.dataset.test_batches(experiment.settings.batch_size, programs.rows)
    computed = (programs.eval_step(state, programs.put(batch)) for batch in batches)
    for sums in _late(computed, STEPS_AHEAD):
        for name, value in jax.device_get(sums).items():
            totals[name] += float(value)
    return {
        "loss": totals["loss"] / totals["count"],
        "accuracy": totals["correct"] / totals["count"],
        "top5_accuracy": totals["correct_top5"] / totals["count"],
    }


def _late(items: Iterator[Any], lag: int) -> Iterator[Any]:
    """Yields each item when `lag` more were begun: the host reads on, and not too far."""
    begun = collections.deque()
    for item in items:
        begun.append(item)
        if len(begun) > lag:
            yield begun.popleft()
    yield from begun


def _describe(experiment: Experiment) -> str:
    settings, net, mesh = experiment.settings, experiment.net, experiment.mesh
    devices, processes = mesh.devices.flat, jax.process_count()
    where = f"{devices[0].platform} x {len(devices)}"
    where += f" of {processes} processes" if processes > 1 else ""
    return (
        f"{description(net)}, on {experiment.dataset.name} "
        f"({experiment.dataset.train_size:,} training and {experiment.dataset.test_size:,} test "
        f"images), {settings.steps:,} steps of {settings.batch_size}, on {where}; compiling..."
    )


class _Trainer:
    """The loop over steps: records, evaluates, saves, and stops when it must."""

    def __init__(
        self,
        experiment: Experiment,
        programs: CompiledSteps,
        checkpointer: Checkpointer,
        writer: MetricWriter | NullWriter,
        progress: Progress,
        request: StopRequest,
        callbacks: Sequence[Callback],
    ):
        self._experiment = experiment
        self._settings = experiment.settings
        self._programs = programs
        self._checkpointer = checkpointer
        self._writer = writer
        self._progress = progress
        self._request = request
        self._callbacks = callbacks
        self._pending: list[dict[str, jax.Array]] = []
        self._trained_images = 0
        self._training_seconds = 0.0
        self._observe = jax.jit(observe, out_shardings=replicated(experiment.mesh))
        self.test: dict[str, float] = {}  # of the last evaluation

    def train(self, state: TrainState, batches: data.TrainBatches, first_step: int) -> TrainState:
        settings = self._settings
        self._progress.begin(first_step)
        start = time.monotonic()
        for step in range(first_step + 1, settings.steps + 1):
            state, metrics = self._programs.train_step(state, self._programs.put(next(batches)))
            self._pending.append(metrics)
            # Not further ahead of the devices, which would hold all the batches between.
            jax.block_until_ready(self._pending[-STEPS_AHEAD - 1 : -STEPS_AHEAD])
            last = step == settings.steps
            stopping = self._request.reached(step)
            evaluating = step % settings.eval_every == 0 or last
            saving = step % settings.checkpoint_every == 0 or evaluating or stopping
            if settings.observe_every and step % settings.observe_every == 0:
                found = self._observe(state.params, state.opt_state)
                self._writer.write(step, "layers", **jax.device_get(found))
            if not (step % settings.log_every == 0 or evaluating or saving):
                continue
            record = self._collect(step)
            self._training_seconds += time.monotonic() - start
            self._report(step, record, state if evaluating else None)
            if saving:
                self._checkpointer.save(
                    step,
                    state,
                    batches.get_state(),
                    test_accuracy=self.test["accuracy"] if evaluating else None,
                    wait=last or stopping,
                )
            if stopping and not last:
                name = signal.Signals(self._request.signal_number).name
                raise Interrupted(
                    f"{name}: saved at step {step} of {settings.steps}; run the same command "
                    "again to go on from there",
                    self._request.signal_number,
                )
            start = time.monotonic()
        return state

    def images_per_second(self) -> float | None:
        """Training throughput without compilation and evaluation, or None before any step."""
        if not self._trained_images:
            return None
        return round(self._trained_images / self._training_seconds, 1)

    def _collect(self, step: int) -> dict[str, float]:
        """Means over the steps since the last record; raises if one of them is not finite."""
        window = jax.device_get(self._pending)
        self._pending.clear()
        self._trained_images += len(window) * self._settings.batch_size
        for offset, metrics in enumerate(window):
            bad = [k for k in ("loss", "param_norm") if not math.isfinite(metrics[k])]
            if bad:
                raise DivergenceError(self._divergence(step - len(window) + 1 + offset, bad))
        return {name: sum(float(m[name]) for m in window) / len(window) for name in window[0]}

    def _divergence(self, step: int, names: list[str]) -> str:
        self._checkpointer.wait()
        saved = self._checkpointer.latest_step()
        kept = "no checkpoint had been saved" if saved is None else f"step {saved} is kept"
        return (
            f"training diverged at step {step}: {' and '.join(names)} no longer finite ({kept}). "
            "Try a smaller optimizer.learning_rate, a longer schedule.warmup_steps, or modulation"
        )

    def _report(self, step: int, record: dict[str, float], evaluated: TrainState | None) -> None:
        rate = float(self._experiment.schedule(step - 1))
        self._writer.write(step, "train", **record, learning_rate=rate)
        test_accuracy = None
        if evaluated is not None:
            self.test = evaluate(self._experiment, self._programs, evaluated)
            self._writer.write(step, "test", **self.test)
            test_accuracy = self.test["accuracy"]
        self._progress.update(
            step,
            loss=record["loss"],
            train_accuracy=record["accuracy"],
            test_accuracy=test_accuracy,
            images_per_second=self.images_per_second(),
        )
        told = {**record, "learning_rate": rate}
        if test_accuracy is not None:
            told["test_accuracy"] = test_accuracy
        for callback in self._callbacks:
            callback(step, told)
