"""The compiled programs of a run: one of each, made before the first step."""

import functools
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from orthojax.experiment import Experiment
from orthojax.sharding import (
    batch_sharding,
    local_rows,
    replicated,
    state_shardings,
    to_devices,
)
from orthojax.state import TrainState, init_state
from orthojax.step import make_eval_step, make_train_step


class Programs(NamedTuple):
    """Compiled ahead of time, so that a shape that changes is an error and not a second compile.

    Attributes:
      abstract_state: shapes, dtypes and shardings of the train state.
      init: `() -> state`; no device and no host ever holds more of it than its share.
      train_step: `(state, batch) -> (state, metrics)`; the state given is consumed.
      eval_step: `(state, batch) -> sums`.
      rows: which rows of a batch this process supplies.
      put: this process's rows of a batch to the devices.
      compile_seconds: what compiling took.
    """

    abstract_state: TrainState
    init: Any
    train_step: Any
    eval_step: Any
    rows: np.ndarray
    put: Any
    compile_seconds: float


def compile_programs(experiment: Experiment) -> Programs:
    """Compiles initialisation, training step and evaluation step for the experiment's mesh."""
    start = time.monotonic()
    batch_size = experiment.settings.batch_size
    split = batch_sharding(experiment.mesh, batch_size)
    rows = local_rows(split, batch_size)
    state = abstract_state(experiment)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return Programs(
        abstract_state=state,
        init=jax.jit(_init(experiment), out_shardings=shardings).lower().compile(),
        train_step=lower_train_step(experiment).compile(),
        eval_step=_lower_eval_step(experiment).compile(),
        rows=rows,
        put=functools.partial(to_devices, split, batch_size, rows),
        compile_seconds=time.monotonic() - start,
    )


def abstract_state(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and shardings of the train state; computes nothing."""
    shapes = jax.eval_shape(_init(experiment))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, experiment.mesh),
    )


def lower_train_step(experiment: Experiment) -> jax.stages.Lowered:
    """The training step of an experiment, traced and ready to compile for its mesh."""
    step = make_train_step(
        experiment.net,
        experiment.optimizer,
        experiment.dataset.augment,
        experiment.settings.seed,
        _gather(experiment),
    )
    state = abstract_state(experiment)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    jitted = jax.jit(step, out_shardings=(shardings, replicated(experiment.mesh)), donate_argnums=0)
    return jitted.lower(state, _abstract_batch(experiment, image="uint8", label="int32"))


def _lower_eval_step(experiment: Experiment) -> jax.stages.Lowered:
    step = make_eval_step(experiment.net, experiment.dataset.normalize, _gather(experiment))
    batch = _abstract_batch(experiment, image="uint8", label="int32", mask="float32")
    jitted = jax.jit(step, out_shardings=replicated(experiment.mesh))
    return jitted.lower(abstract_state(experiment), batch)


def _init(experiment: Experiment):
    return functools.partial(
        init_state,
        experiment.net,
        experiment.optimizer,
        experiment.dataset.image_shape,
        experiment.settings.seed,
    )


def _gather(experiment: Experiment):
    """Left to itself, the compiler would split the convolutions instead, and move activations."""
    whole = replicated(experiment.mesh)
    return functools.partial(jax.lax.with_sharding_constraint, shardings=whole)


def _abstract_batch(experiment: Experiment, **dtypes: str) -> dict[str, jax.ShapeDtypeStruct]:
    batch_size = experiment.settings.batch_size
    sharding = batch_sharding(experiment.mesh, batch_size)
    shapes = {"image": (batch_size, *experiment.dataset.image_shape)}
    return {
        name: jax.ShapeDtypeStruct(shapes.get(name, (batch_size,)), dtype, sharding=sharding)
        for name, dtype in dtypes.items()
    }
