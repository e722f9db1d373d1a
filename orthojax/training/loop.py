"""The loop over steps, and evaluation."""

import collections
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from orthojax import data
from orthojax.errors import DivergenceError
from orthojax.parallel.mesh import replicated
from orthojax.storage.checkpoint import Checkpointer
from orthojax.storage.metrics import MetricWriter, NullWriter
from orthojax.training.best import Best
from orthojax.training.compiled import CompiledSteps
from orthojax.training.experiment import Experiment
from orthojax.training.interrupt import Interrupted, StopRequest
from orthojax.training.observe import observe
from orthojax.training.progress import Progress
from orthojax.training.state import TrainState

STEPS_AHEAD = 2  # that the host may have begun and the devices not finished

Callback = Callable[[int, dict[str, float]], None]


class Trainer:
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
        best: Best | None,
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
        self._observe = jax.jit(
            lambda params, opt_state: observe(params, opt_state, experiment.view),
            out_shardings=replicated(experiment.mesh),
        )
        self.best = best
        self.evaluated: dict[str, dict[str, float]] = {}  # at the last evaluation, by split
        self.step = 0  # the last one that has been taken

    def train(self, state: TrainState, batches: data.TrainBatches, first_step: int) -> TrainState:
        """The state after the last step, or after that at which patience ends.

        Raises:
          DivergenceError: the loss or a parameter is no longer finite.
          Interrupted: a signal came; the state has been saved.
        """
        settings = self._settings
        self._progress.begin(first_step)
        start = time.monotonic()
        self.step = first_step
        if self.out_of_patience and first_step < settings.steps:
            self._tell_of_patience()
            return state
        for step in range(first_step + 1, settings.steps + 1):
            self.step = step
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
            ended = last or self.out_of_patience
            if saving:
                best = self.best and dataclasses.asdict(self.best)
                position = batches.get_state()
                self._checkpointer.save(step, state, position, best=best, wait=ended or stopping)
            if ended:
                if not last:
                    self._tell_of_patience()
                break
            if stopping:
                name = signal.Signals(self._request.signal_number).name
                raise Interrupted(
                    f"{name}: saved at step {step} of {settings.steps}; run the same command "
                    "again to go on from there",
                    self._request.signal_number,
                )
            start = time.monotonic()
        return state

    @property
    def out_of_patience(self) -> bool:
        """Whether there have been `patience` evaluations without a better validation accuracy."""
        patience, value = self._settings.patience, self._settings.recalibrate_bn
        return self.best is not None and self.best.exhausts(patience, value)

    def _tell_of_patience(self) -> None:
        best = self.best
        self._progress.message(
            f"patience={self._settings.patience} ends training at step {self.step}: validation "
            f"accuracy was best at step {best.step}, {best.accuracy:.1%}"
        )

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
        accuracies = {} if evaluated is None else self._evaluate(step, evaluated)
        self._progress.update(
            step,
            loss=record["loss"],
            train_accuracy=record["accuracy"],
            accuracies=accuracies,
            images_per_second=self.images_per_second(),
        )
        told = {f"{split}_accuracy": accuracy for split, accuracy in accuracies.items()}
        for callback in self._callbacks:
            callback(step, {**record, "learning_rate": rate, **told})

    def _evaluate(self, step: int, state: TrainState) -> dict[str, float]:
        """The accuracies by split: where there is a validation split, of that until the end."""
        self.evaluated = {}
        if self._experiment.dataset.validation_size:
            accuracy = self._evaluate_on("validation", step, state)
            found = Best(step, accuracy, self._settings.recalibrate_bn)
            self.best = found if self.best is None else self.best.after(found)
            if step == self._settings.steps or self.out_of_patience:
                self._evaluate_on("test", step, state)
        else:
            self._evaluate_on("test", step, state)
        return {split: found["accuracy"] for split, found in self.evaluated.items()}

    def _evaluate_on(self, split: str, step: int, state: TrainState) -> float:
        found = evaluate(self._experiment, self._programs, state, split)
        self._writer.write(step, split, **found)
        self.evaluated[split] = found
        return found["accuracy"]


def evaluate(
    experiment: Experiment, programs: CompiledSteps, state: TrainState, split: str = "test"
) -> dict[str, float]:
    """Mean loss and accuracies over a whole split, "validation" or "test", every image once."""
    state = programs.recalibrate(state)
    totals = {"loss": 0.0, "correct": 0.0, "correct_top5": 0.0, "count": 0.0}
    dataset, size = experiment.dataset, experiment.settings.batch_size
    one_pass = dataset.validation_batches if split == "validation" else dataset.test_batches
    batches = one_pass(size, programs.rows)
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
