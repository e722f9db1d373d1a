"""The compiled programs of a run: one of each, made before the first step."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from orthojax import native
from orthojax.parallel.mesh import (
    batch_sharding,
    local_rows,
    replicated,
    state_shardings,
    to_devices,
)
from orthojax.training.experiment import Experiment, TracedHyperparams
from orthojax.training.state import TrainState, init_state
from orthojax.training.step import Metrics, make_eval_step, make_recalibrate, make_train_step

# For what runs once, compiling is what costs: random numbers take a third of the time, and come out
# the same to the last bit.
ONCE = {"cpu": {"xla_backend_optimization_level": 1}}


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """Compiled ahead of time, so that a shape that changes is an error and not a second compile.

    Attributes:
      abstract_state: shapes, dtypes and shardings of the train state.
      hyperparams: the config's, which the next two are called with.
      compiled_init: `seed -> state`.
      compiled_train_step: `(state, batch, hyperparams) -> (state, metrics)`.
      eval_step: `(state, batch) -> sums`.
      recalibrate: `state -> state` with BN statistics for evaluation; the state itself where the
        config wants the running ones.
      rows: which rows of a batch this process supplies.
      put: this process's rows of a batch to the devices.
      convolution: whose a training step has, see `orthojax.native.describe`.
      compile_seconds: what compiling took.
    """

    abstract_state: TrainState
    hyperparams: TracedHyperparams
    compiled_init: jax.stages.Compiled
    compiled_train_step: jax.stages.Compiled
    eval_step: jax.stages.Compiled
    recalibrate: Callable[[TrainState], TrainState]
    rows: np.ndarray
    put: Any
    convolution: str
    compile_seconds: float

    def init(self) -> TrainState:
        """The first state; no device and no host ever holds more of it than its share."""
        return self.compiled_init(self.hyperparams.seed)

    def train_step(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """The next state and the metrics of the step; the state given is consumed."""
        return self.compiled_train_step(state, batch, self.hyperparams)


def compile_steps(experiment: Experiment) -> CompiledSteps:
    """Compiles initialization, training step and evaluation step for the experiment's mesh."""
    start = time.monotonic()
    batch_size = experiment.settings.batch_size
    split = batch_sharding(experiment.mesh, batch_size)
    rows = local_rows(split, batch_size)
    state = abstract_state(experiment)
    options = ONCE.get(experiment.mesh.devices.flat[0].platform)
    lowered = lower_train_step(experiment, state)
    init = jax.jit(_init(experiment), out_shardings=_shardings(state), compiler_options=options)
    return CompiledSteps(
        abstract_state=state,
        hyperparams=experiment.hyperparams,
        compiled_init=init.lower(_abstract_hyperparams(experiment).seed).compile(),
        compiled_train_step=lowered.compile(),
        eval_step=_lower_eval_step(experiment, state).compile(),
        recalibrate=_compile_recalibrate(experiment, state),
        rows=rows,
        put=functools.partial(to_devices, split, batch_size, rows),
        convolution=native.describe(lowered),
        compile_seconds=time.monotonic() - start,
    )


def abstract_state(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and shardings of the train state; computes nothing."""
    shapes = jax.eval_shape(_init(experiment), experiment.hyperparams.seed)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, experiment.mesh),
    )


def lower_train_step(experiment: Experiment, state: TrainState) -> jax.stages.Lowered:
    """The training step of an experiment, traced and ready to compile for its mesh.

    Args:
      experiment: what is trained.
      state: of `abstract_state`.
    """
    batch = _abstract_batch(experiment, image="uint8", label="int32")
    shardings = _shardings(state), replicated(experiment.mesh)
    jitted = jax.jit(uncompiled_step(experiment), out_shardings=shardings, donate_argnums=0)
    return jitted.lower(state, batch, _abstract_hyperparams(experiment))


def uncompiled_step(experiment: Experiment) -> Callable:
    """The training step `(state, batch, hyperparams) -> (state, metrics)`, not compiled."""

    def train_step(state, batch, hyperparams):
        optimizer = experiment.optimizer(hyperparams)
        augment = experiment.dataset.augment
        gather = _gather(experiment)
        step = make_train_step(experiment.net, optimizer, augment, hyperparams.seed, gather)
        return step(state, batch)

    return train_step


def _lower_eval_step(experiment: Experiment, state: TrainState) -> jax.stages.Lowered:
    step = make_eval_step(experiment.net, experiment.dataset.normalize, _gather(experiment))
    batch = _abstract_batch(experiment, image="uint8", label="int32", mask="float32")
    jitted = jax.jit(step, out_shardings=replicated(experiment.mesh))
    return jitted.lower(state, batch)


def _compile_recalibrate(
    experiment: Experiment, state: TrainState
) -> Callable[[TrainState], TrainState]:
    settings, dataset, mesh = experiment.settings, experiment.dataset, experiment.mesh
    size = settings.recalibrate_bn
    if not size:
        return lambda state: state
    split = batch_sharding(mesh, size)
    rows = local_rows(split, size)
    recalibrate = make_recalibrate(experiment.net, dataset.normalize, _gather(experiment))
    images = jax.ShapeDtypeStruct((size, *dataset.image_shape), "uint8", sharding=split)
    # The statistics alone: the rest of the state would be copied on its way out.
    statistics = jax.jit(
        lambda state, images: recalibrate(state, images).batch_stats,
        out_shardings=_shardings(state.batch_stats),
    )
    compiled = statistics.lower(state, images).compile()

    @functools.cache
    def batch():
        batches = dataset.train_batches(size, settings.seed, rows)
        try:
            return to_devices(split, size, rows, next(batches)["image"])
        finally:
            batches.close()

    return lambda state: state.replace(batch_stats=compiled(state, batch()))


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def _init(experiment: Experiment):
    optimizer = experiment.optimizer(experiment.hyperparams)
    shape = experiment.dataset.image_shape
    scale = experiment.loss_scale
    return functools.partial(init_state, experiment.net, optimizer, shape, loss_scale=scale)


def _gather(experiment: Experiment):
    """Left to itself, the compiler would split the convolutions instead, and move activations."""
    whole = replicated(experiment.mesh)
    return functools.partial(jax.lax.with_sharding_constraint, shardings=whole)


def _abstract_hyperparams(experiment: Experiment) -> TracedHyperparams:
    whole = replicated(experiment.mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((), leaf.dtype, sharding=whole), experiment.hyperparams
    )


def _abstract_batch(experiment: Experiment, **dtypes: str) -> dict[str, jax.ShapeDtypeStruct]:
    batch_size = experiment.settings.batch_size
    sharding = batch_sharding(experiment.mesh, batch_size)
    shapes = {"image": (batch_size, *experiment.dataset.image_shape)}
    return {
        name: jax.ShapeDtypeStruct(shapes.get(name, (batch_size,)), dtype, sharding=sharding)
        for name, dtype in dtypes.items()
    }
