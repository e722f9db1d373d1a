"""The loop over steps, and evaluation."""

import collections
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
        self.test: dict[str, float] = {}  # of the last evaluation

    def train(self, state: TrainState, batches: data.TrainBatches, first_step: int) -> TrainState:
        """The state after the last step.

        Raises:
          DivergenceError: the loss or a parameter is no longer finite.
          Interrupted: a signal came; the state has been saved.
        """
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
