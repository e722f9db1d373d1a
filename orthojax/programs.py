"""The compiled programs of a run: one of each, made before the first step."""

import functools
import time
from typing import Any, NamedTuple

import jax

from orthojax import data
from orthojax.experiment import Experiment
from orthojax.sharding import batch_sharding, replicated
from orthojax.state import init_state
from orthojax.step import make_eval_step, make_train_step


class Programs(NamedTuple):
    """Compiled ahead of time, so that a shape that changes is an error and not a second compile.

    Attributes:
      abstract_state: shapes, dtypes and shardings of the train state.
      init: `() -> state`.
      train_step: `(state, batch) -> (state, metrics)`; the state given is consumed.
      eval_step: `(state, batch) -> sums`.
      put: a host batch to the devices.
      compile_seconds: what compiling took.
    """

    abstract_state: Any
    init: Any
    train_step: Any
    eval_step: Any
    put: Any
    compile_seconds: float


def compile_programs(experiment: Experiment) -> Programs:
    """Compiles initialisation, training step and evaluation step for the experiment's mesh."""
    start = time.monotonic()
    settings, dataset = experiment.settings, experiment.dataset
    mean, std = dataset.mean, dataset.std
    image_shape = dataset.train.images.shape[1:]
    init = functools.partial(
        init_state, experiment.net, experiment.optimizer, image_shape, settings.seed
    )
    augment = functools.partial(data.augment, mean=mean, std=std, flip=experiment.flip)
    normalize = functools.partial(data.normalize, mean=mean, std=std)
    train_step = make_train_step(experiment.net, experiment.optimizer, augment, settings.seed)
    eval_step = make_eval_step(experiment.net, normalize)

    everywhere = replicated(experiment.mesh)
    split = batch_sharding(experiment.mesh, settings.batch_size)
    abstract_state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere),
        jax.eval_shape(init),
    )
    shapes = {
        "image": jax.ShapeDtypeStruct((settings.batch_size, *image_shape), "uint8"),
        "label": jax.ShapeDtypeStruct((settings.batch_size,), "int32"),
    }
    mask = {"mask": jax.ShapeDtypeStruct((settings.batch_size,), "float32")}
    jitted_train_step = jax.jit(
        train_step,
        in_shardings=(everywhere, split),
        out_shardings=(everywhere, everywhere),
        donate_argnums=0,
    )
    jitted_eval_step = jax.jit(
        eval_step, in_shardings=(everywhere, split), out_shardings=everywhere
    )
    return Programs(
        abstract_state=abstract_state,
        init=jax.jit(init, out_shardings=everywhere).lower().compile(),
        train_step=jitted_train_step.lower(abstract_state, shapes).compile(),
        eval_step=jitted_eval_step.lower(abstract_state, shapes | mask).compile(),
        put=lambda batch: jax.device_put(batch, split),
        compile_seconds=time.monotonic() - start,
    )
