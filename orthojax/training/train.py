"""`train_and_evaluate`: a config and a working directory in, a trained net and its record out.

The way down from here: `experiment.build` makes of the config what does not change (data set, net,
optimizer, mesh); `compiled.compile_steps` makes programs of that, whose step is
`step.make_train_step`; `trainer.Trainer` calls them, step by step.
"""

import contextlib
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from orthojax import checks, data
from orthojax.config.sections import bind
from orthojax.console import tell
from orthojax.data import preprocessing
from orthojax.data.preprocessing import Preprocessing
from orthojax.errors import DatasetError, WorkdirError
from orthojax.extras import require
from orthojax.parallel.processes import is_first, on_first_process
from orthojax.pictures.curves import draw_curves
from orthojax.sites import weights_only
from orthojax.storage.checkpoint import Checkpointer
from orthojax.storage.metrics import MetricWriter, NullWriter, read_metrics
from orthojax.storage.paths import to_path
from orthojax.storage.saved import saved_steps
from orthojax.storage.workdir import (
    CONFIG,
    check_owned,
    check_workdir,
    claim,
    failures_explained,
    note_start,
    read_run_file,
    seal,
    write_json_atomic,
)
from orthojax.training.best import Best
from orthojax.training.compiled import abstract_state, compile_steps
from orthojax.training.experiment import Experiment, Settings, build
from orthojax.training.fine_tune import check_fits, check_model, take_over
from orthojax.training.interrupt import stop_on_signals
from orthojax.training.loop import Callback, Trainer, evaluate
from orthojax.training.net import description
from orthojax.training.progress import Progress
from orthojax.training.restore import Trained, read_trained
from orthojax.training.summary import read_finished, write_summary


def train_and_evaluate(
    config: Mapping, workdir: str | pathlib.Path, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Trains what `config` describes in `workdir`, or goes on where a run there stopped.

    A run that has finished is left as it is, and its summary is returned. Several processes (see
    `orthojax.parallel.processes.initialize`) call it alike, with a `workdir` that all of them see;
    a run may go on with another number of processes or devices than before.
    Writes `config.json`, `environment.json`, `preprocessing.json`, `metrics.jsonl`,
    `checkpoints/`, `summary.json` and `curves.png` into `workdir`, and progress to stderr; of
    several processes the first one does. `orthojax.load_classifier(workdir)` is the trained net.

    Args:
      config: a Mapping or ConfigDict with the keys of `orthojax.training.experiment.Settings`.
      workdir: a directory of this run's own, or `gs://…`; created when missing.
      callbacks: each is called with the step and a record, when one is written: means of `loss`,
        `accuracy`, `grad_norm`, `param_norm` since the last, `learning_rate`, and
        `validation_accuracy` and `test_accuracy` where the net has been evaluated on that split.
        What one raises ends the training; what was saved stays.

    Returns:
      What `summary.json` holds: `test_accuracy`, `test_top5_accuracy` (the label is among the five
      largest logits) and `test_loss` of the last step on the whole test split, `steps` (taken),
      `seconds` (of this call), `compile_seconds`, `images_per_second` (while training; null if
      nothing was left to train), `parameters` (their number) and `resumed_from_step`; and
      `chosen_by`, the split that chose a best checkpoint: null, or "validation" where there is that
      split. Then also `best_step`, which is kept, `best_validation_accuracy`, `validation_accuracy`
      of the last step, and `stopped_by_patience`: `patience` where that ended training, else null.

    Raises:
      UserError: see `build`, `orthojax.storage.workdir.claim` and
        `orthojax.storage.checkpoint.Checkpointer`; or the run in `workdir` was trained on other
        data: other names of classes, another shape or resizing of images, other statistics of
        pixels. Then nothing is written.
      DivergenceError: the loss or a parameter is no longer finite. The last checkpoint, saved
        while they were, is kept.
      Interrupted: SIGINT, SIGTERM or SIGHUP, in whichever process; the state has been saved.
    """
    if not hasattr(config, "items"):
        raise checks.refuse("config", config, "a dictionary or a ConfigDict")
    checks.path("workdir", workdir)
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise checks.refuse("callbacks", callbacks, "a list of functions (step, record)")
    workdir = to_path(workdir)
    on_first_process(lambda: check_workdir(workdir))
    source = _checked_first(bind(Settings, config, ""), workdir)
    experiment = build(config)
    with failures_explained(workdir):
        on_first_process(lambda: _claim(workdir, config, experiment.dataset))
        settings = experiment.settings
        summary = read_finished(workdir, settings.steps, settings.patience)
        return summary or _train(experiment, workdir, callbacks, source)


def _checked_first(settings: Settings, workdir: Any) -> Trained | None:
    """What can fail before images are decoded and programs compiled; the run to begin from."""
    if settings.tensorboard and is_first():
        require("tensorboard", "writing TensorBoard events")
    if settings.init_from is None or saved_steps(workdir / "checkpoints"):
        return None
    source = _read_source(settings)
    check_model(settings, source)
    return source


def _read_source(settings: Settings) -> Trained:
    # Its code is run anyway, if it is this run's own net.
    return read_trained(settings.init_from, own_net=settings.model.get("name"))


def _claim(workdir: Any, config: Mapping, dataset: data.Dataset) -> None:
    claim(workdir, config, lambda: _check_same_data(workdir, dataset))
    write_json_atomic(workdir / preprocessing.FILE, dataset.preprocessing.to_json())
    seal(workdir, CONFIG)


def _check_same_data(workdir: Any, dataset: data.Dataset) -> None:
    path = workdir / preprocessing.FILE
    if not path.exists():
        return
    try:
        saved = Preprocessing.from_json(read_run_file(workdir, preprocessing.FILE))
    except (WorkdirError, DatasetError) as error:
        reason = str(error).partition("\n")[0]
        tell(f"{path} is damaged ({reason}); it is written anew from the data set as it is")
        return
    changes = saved.differences(dataset.preprocessing)
    if changes:
        raise WorkdirError(
            f"{workdir} holds a run that was trained on other data (there -> here):\n  "
            + "\n  ".join(changes)
            + "\nChoose another --workdir, or bring the data back to what it was."
        )


def _train(
    experiment: Experiment, workdir: Any, callbacks: Sequence[Callback], source: Trained | None
) -> dict[str, Any]:
    start = time.monotonic()
    settings = experiment.settings
    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(
            Checkpointer(workdir / "checkpoints", keep=settings.keep_checkpoints)
        )
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stream = sys.stderr if is_first() else nowhere
        progress = stack.enter_context(Progress(settings.steps, stream))
        progress.message(_describe(experiment))
        names = experiment.dataset.preprocessing.class_names
        if settings.init_from is not None and checkpointer.latest_step() is None:
            source = source or _read_source(settings)  # what was saved may be damaged
            check_fits(abstract_state(experiment), source, names)
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
                state, told = take_over(state, source, names)
                progress.message(f"begins as step {source.step} of {settings.init_from}: {told}")
        else:
            first_step, state = restored.step, restored.state
            batches.set_state(restored.data_state)
            progress.message(f"resuming {workdir} from step {first_step}")
        writer = NullWriter()
        if is_first():
            changes = note_start(workdir, convolution=programs.convolution)
            if changes and restored is not None:
                progress.message(
                    "from here on the last bits may be others than an undisturbed run's: "
                    + ", ".join(changes)
                )
            resume_step = first_step if restored else None
            writer = MetricWriter(workdir, settings.tensorboard, resume_step)
            # Before every save, which would make the directory anew.
            callbacks = [lambda *_: check_owned(workdir), *callbacks]
        stack.enter_context(writer)
        # From here on there is something to save.
        request = stack.enter_context(stop_on_signals())
        best = Best(**restored.best) if restored and restored.best else None
        trainer = Trainer(
            experiment, programs, checkpointer, writer, progress, request, callbacks, best
        )
        state = trainer.train(state, batches, first_step)
        found = {
            split: trainer.evaluated.get(split) or evaluate(experiment, programs, state, split)
            for split in (("validation", "test") if trainer.best else ("test",))
        }
    summary = {
        "test_accuracy": found["test"]["accuracy"],
        "test_top5_accuracy": found["test"]["top5_accuracy"],
        "test_loss": found["test"]["loss"] if math.isfinite(found["test"]["loss"]) else None,
        "steps": trainer.step,
        "chosen_by": None,
        "seconds": round(time.monotonic() - start, 2),
        "compile_seconds": round(programs.compile_seconds, 2),
        "images_per_second": trainer.images_per_second(),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(weights_only(state.params))),
        "resumed_from_step": first_step,
    }
    if trainer.best:
        early = trainer.out_of_patience and trainer.step < settings.steps
        summary |= {
            "chosen_by": "validation",
            "best_step": trainer.best.step,
            "best_validation_accuracy": trainer.best.accuracy,
            "validation_accuracy": found["validation"]["accuracy"],
            "stopped_by_patience": settings.patience if early else None,
        }
    if is_first():
        check_owned(workdir)
        _draw(workdir)
        write_summary(workdir, summary)  # last: it says that the run has finished
    return summary


def _draw(workdir: Any) -> None:
    try:
        draw_curves(read_metrics(workdir), workdir / "curves.png", title=workdir.name)
    except Exception as error:  # whatever is wrong with matplotlib, the training is done
        tell(f"curves.png is not drawn: {type(error).__name__}: {error}")


def _describe(experiment: Experiment) -> str:
    settings, net, mesh = experiment.settings, experiment.net, experiment.mesh
    devices, processes = mesh.devices.flat, jax.process_count()
    where = f"{devices[0].platform} x {len(devices)}"
    where += f" of {processes} processes" if processes > 1 else ""
    return (
        f"{description(net)}, on {experiment.dataset.name} "
        f"({_sizes(experiment.dataset)} images), {settings.steps:,} steps of "
        f"{settings.batch_size}, on {where}; compiling..."
    )


def _sizes(dataset: data.Dataset) -> str:
    held_out = f", {dataset.validation_size:,} validation" if dataset.validation_size else ""
    return f"{dataset.train_size:,} training{held_out} and {dataset.test_size:,} test"
