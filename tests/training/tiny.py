"""The smallest run: whoever trains it finds its programs compiled, whatever its steps are."""

import dataclasses
from collections.abc import Iterator
from unittest import mock

from ml_collections import ConfigDict

from orthojax.configs import digits_plain110
from orthojax.training import train
from orthojax.training.compiled import CompiledSteps, compile_steps
from orthojax.training.experiment import Experiment

NO_PART_OF_A_PROGRAM = {
    *("steps", "log_every", "eval_every", "checkpoint_every", "observe_every"),
    *("init_from", "keep_checkpoints", "patience"),
}


def tiny_config(steps: int = 12, **changes) -> ConfigDict:
    """Eight layers of four channels; the schedule is the same for any number of steps."""
    config = digits_plain110.get_config(f"depth=8,steps={steps}")
    config.model.width, config.batch_size, config.mesh.data = 4, 32, 1
    config.schedule.warmup_steps, config.schedule.boundaries = 2, ()
    config.eval_every = config.checkpoint_every = steps
    config.update(changes)
    return config


def programs_shared() -> Iterator[None]:
    """A fixture's body: while open, equal programs of several runs are traced and compiled once."""
    made: dict[str, CompiledSteps] = {}

    def compiled(experiment: Experiment) -> CompiledSteps:
        settings = {**vars(experiment.settings)}
        settings["optimizer"] = {**settings["optimizer"], "learning_rate": None}
        key = str([item for item in settings.items() if item[0] not in NO_PART_OF_A_PROGRAM])
        if key not in made:
            made[key] = compile_steps(experiment)
        return dataclasses.replace(made[key], hyperparams=experiment.hyperparams)

    with mock.patch.object(train, "compile_steps", compiled):
        yield
