"""Optimizers, learning-rate schedules and regularizers by name, from a config's sections."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from orthojax.config.sections import bind
from orthojax.config.suggestion import suggestion
from orthojax.errors import ConfigError
from orthojax.ortho import optax_ortho, soap, stiefel
from orthojax.parallel.sharded_penalty import shard_penalty
from orthojax.sites import SITE


def muon(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.95,
    weight_decay: float = 0.0,
    adam_b1: float = 0.9,
    adam_b2: float = 0.999,
) -> optax.GradientTransformation:
    """`optax.contrib.muon` on all kernels, read as `(f_in, f_out)`; AdamW on everything else.

    The singular values of an update are about 1, times the root of f_out / f_in where that is more.
    """
    return optax.contrib.muon(
        learning_rate,
        beta=momentum,
        weight_decay=weight_decay,
        adam_b1=adam_b1,
        adam_b2=adam_b2,
        muon_weight_dimension_numbers=_matrix_axes,
    )


def _matrix_axes(params: Any) -> Any:
    """Of kernels, leading axes of stacked ones left out; None is not Muon's."""

    def axes(path, leaf):
        if jax.tree_util.keystr(path[-1:], simple=True) != "kernel":
            return None
        window = 2 if leaf.ndim >= 4 else 0
        return optax.contrib.MuonDimensionNumbers(
            reduction_axis=tuple(range(-2 - window, -1)), output_axis=(-1,)
        )

    return jax.tree_util.tree_map_with_path(axes, params)


# Optax's own functions, and Muon: every argument they have is a key that the config may set.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "sgd": optax.sgd,
    "adagrad": optax.adagrad,
    "adadelta": optax.adadelta,
    "adam": optax.adam,
    "adamw": optax.adamw,
    "rmsprop": optax.rmsprop,
    "lars": optax.lars,
    "muon": muon,
    "soap": soap,
}
# Those that rescale the gradient. A regularizer's is not to be rescaled with the loss's: it comes
# behind, and the learning rate alone applies to it, as to the weight decay of AdamW.
ADAPTIVE = frozenset(OPTIMIZERS) - {"sgd"}
# Of their arguments, those that make sense in a range alone, and which optax does not check.
_FUNCTIONS = ("mask", "weight_decay_mask", "trust_ratio_mask", "view")
_FRACTIONS = ("momentum", "decay", "rho", "b1", "b2")
_NOT_NEGATIVE = (
    *("learning_rate", "weight_decay", "coefficient", "eps", "eps_root"),
    *("initial_accumulator_value", "initial_scale"),
)


def step_decay(
    *,
    base: float,
    steps: int,
    warmup_steps: int = 0,
    boundaries: tuple[float, ...] = (0.5, 0.75),
    factor: float = 0.1,
) -> optax.Schedule:
    """Linear warm-up to `base`, then a multiplication by `factor` at each boundary.

    Args:
      base: learning rate after the warm-up.
      steps: length of the run.
      warmup_steps: steps from 0 to `base`; the first step already moves.
      boundaries: fractions of the run. The paper's are 32k and 48k of 64k.
      factor: what the rate is multiplied with at each.

    Raises:
      ConfigError: the boundaries are not from 0 to 1 in ascending order, `factor` is not positive,
        or the warm-up is longer than the run.

    Example:
      >>> schedule = step_decay(base=0.1, steps=100)
      >>> [round(float(schedule(step)), 6) for step in (0, 49, 50, 75)]
      [0.1, 0.1, 0.01, 0.001]
    """
    ascending = all(a < b for a, b in itertools.pairwise(boundaries))
    if not ascending or not all(0 <= fraction <= 1 for fraction in boundaries):
        raise ConfigError(
            f"`schedule.boundaries` is {tuple(boundaries)}; they are fractions of the run, from 0 "
            "to 1 and in ascending order"
        )
    if not factor > 0:
        raise ConfigError(f"`schedule.factor` is {factor}; it must be more than 0")
    factors: dict[int, float] = {}
    for fraction in boundaries:  # in a short run several may fall on one step
        step = round(fraction * steps)
        factors[step] = factors.get(step, 1.0) * factor
    return _with_warmup(optax.piecewise_constant_schedule(base, factors), warmup_steps, steps)


def cosine(*, base: float, steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Linear warm-up to `base`, times half a cosine from 1 to 0 over the whole run."""
    return _with_warmup(optax.cosine_decay_schedule(base, steps), warmup_steps, steps)


def linear(*, base: float, steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Linear warm-up to `base`, times a straight line from 1 to 0 over the whole run."""
    return _with_warmup(optax.linear_schedule(base, 0.0, steps), warmup_steps, steps)


def constant(*, base: float, steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """Linear warm-up to `base`, then `base`."""
    return _with_warmup(optax.constant_schedule(base), warmup_steps, steps)


def _with_warmup(schedule: optax.Schedule, warmup_steps: int, steps: int) -> optax.Schedule:
    if not 0 <= warmup_steps <= steps:
        raise ConfigError(
            f"`schedule.warmup_steps` is {warmup_steps}; it must be from 0 to steps={steps}"
        )
    if not warmup_steps:
        return schedule
    return lambda step: schedule(step) * jax.numpy.minimum(1.0, (step + 1) / warmup_steps)


SCHEDULES = {"step_decay": step_decay, "cosine": cosine, "linear": linear, "constant": constant}


def l2(coefficient: float = 1e-4) -> optax.GradientTransformation:
    """The gradient of `coefficient/2 Σ‖W‖²` on the kernels (not on biases and BN parameters)."""
    return optax.add_decayed_weights(coefficient, mask=_kernels)


def _kernels(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jax.tree_util.keystr(path[-1:], simple=True) == "kernel", params
    )


REGULARIZERS = {"ortho": optax_ortho, "l2": l2, "none": optax.identity}


def make_optimizer(
    *,
    optimizer: Mapping,
    schedule: Mapping,
    regularizer: Mapping,
    steps: int,
    constraint: Mapping | None = None,
    clip_grad_norm: float | None = None,
    mesh: Mesh | None = None,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Clipping, the regularizer's gradient, the optimizer, and around them the constraint.

    The regularizer's gradient comes behind an optimizer of `ADAPTIVE`, times the learning rate.

    Args:
      optimizer: `name`, `learning_rate`, and arguments of the optax function of that name; of
        `soap` also `rest`, such a section for what is no kernel.
      schedule: `name` and arguments of the function of that name in this file.
      regularizer: `name` and arguments: `ortho` (`orthojax.optax_ortho`), `l2` or `none`.
      steps: length of the run.
      constraint: None, or arguments of `orthojax.stiefel`, which keeps all kernels orthonormal.
      clip_grad_norm: the largest norm of the gradient of the loss, over all weights; a larger one
        is scaled down. None does not clip.
      mesh: devices that share the work of `ortho`, see `orthojax.parallel.sharded_penalty`.

    Returns:
      The gradient transformation and the schedule it uses.

    Raises:
      ConfigError: a name or a key is unknown, or both a regularizer and a constraint are wanted.

    Example:
      >>> transformation, schedule = make_optimizer(
      ...     optimizer={"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
      ...     schedule={"name": "step_decay"},
      ...     regularizer={"name": "ortho", "coefficient": 1e-4},
      ...     steps=100,
      ... )
      >>> float(schedule(0))
      0.10000000149011612
    """
    _check_ranges(regularizer, "regularizer")
    bound, rates = _bind_optimizer(optimizer, "optimizer", schedule, steps)
    regularize = bind_named(REGULARIZERS, regularizer, "regularizer")
    if mesh is not None and regularizer["name"] == "ortho":
        regularize = shard_penalty(regularize, mesh)
    chained = [regularize, bound]
    if optimizer["name"] in ADAPTIVE:
        chained = [bound, _behind(regularize, rates)]
    if clip_grad_norm is not None:
        chained.insert(0, optax.clip_by_global_norm(clip_grad_norm))
    made = optax.chain(*chained)
    if constraint is not None:
        if regularizer["name"] != "none":
            raise ConfigError(
                f"`regularizer.name` is {regularizer['name']!r} and `constraint` is set: on "
                "orthonormal kernels a regularizer does nothing; set its name to none, or the "
                "constraint to None"
            )
        made = bind(stiefel, constraint, "constraint", inner=made)
    return made, rates


def _bind_optimizer(section: Mapping, path: str, schedule: Mapping, steps: int):
    """The optimizer of a section, and of one within it, each on the schedule; the first's rates."""
    arguments = dict(section)
    if arguments.get("learning_rate") is None:
        raise ConfigError(f"missing from the config: `{path}.learning_rate`")
    _check_ranges(section, path)
    base = arguments["learning_rate"]
    rates = bind_named(SCHEDULES, schedule, "schedule", base=base, steps=steps)
    arguments["learning_rate"] = rates
    if (rest := arguments.get("rest")) is not None:
        if not isinstance(rest, Mapping | ConfigDict):
            raise ConfigError(f"`{path}.rest` is {rest!r}; it must be a section, an optimizer's")
        arguments["rest"], _ = _bind_optimizer(rest, f"{path}.rest", schedule, steps)
    return bind_named(OPTIMIZERS, arguments, path), rates


def _behind(
    regularize: optax.GradientTransformation, rates: optax.Schedule
) -> optax.GradientTransformation:
    """Adds a regularizer's gradient, times the negative learning rate, to finished updates."""
    scaled = optax.chain(regularize, optax.scale_by_learning_rate(rates))

    def update(updates, state, params=None):
        added, state = scaled.update(optax.tree.zeros_like(updates), state, params)
        return optax.tree.add(updates, added), state

    return optax.GradientTransformation(scaled.init, update)


def _check_ranges(section: Mapping, path: str) -> None:
    for key, value in section.items():
        if key in _FUNCTIONS and isinstance(
            value, str | int | float | tuple | Mapping | ConfigDict
        ):
            raise ConfigError(f"`{path}.{key}` is {value!r}; it is a function, or None in a config")
        if key.endswith("_dtype") and value not in (None, "float32", "bfloat16"):
            raise ConfigError(f"`{path}.{key}` is {value!r}; it must be float32, bfloat16 or None")
        if not isinstance(value, int | float):  # a name, or a number that is traced
            continue
        if key in _FRACTIONS and not 0 <= value < 1:
            raise ConfigError(f"`{path}.{key}` is {value}; it must be at least 0 and less than 1")
        if key in _NOT_NEGATIVE and value < 0:
            raise ConfigError(f"`{path}.{key}` is {value}; it must be at least 0")


def check_arguments(transformation: optax.GradientTransformation, path: str) -> None:
    """Runs a transformation on a few abstract parameters, which finds what optax does not check.

    Raises:
      ConfigError: it fails; the message begins with `path`.
    """
    shapes = {"kernel": (2, 2), "bias": (2,), SITE: (3,)}
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}
    try:
        state = jax.eval_shape(transformation.init, params)
        jax.eval_shape(transformation.update, params, state, params)
    except (
        Exception
    ) as error:  # a string for a mask, a dtype that is none: optax raises what it likes
        raise ConfigError(f"`{path}`: {str(error).splitlines()[0]}") from error


def bind_named(
    registry: Mapping[str, Callable], section: Mapping, path: str, **supplied: Any
) -> Any:
    """Calls the function that the section's `name` stands for with the section's other keys.

    Raises:
      ConfigError: the name is missing or unknown, or a key is no argument of that function.
    """
    arguments = dict(section)
    name = arguments.pop("name", None)
    if name not in registry:
        raise ConfigError(
            f"`{path}.name` is {name!r}{suggestion(str(name), registry, what='names')}"
        )
    return bind(registry[name], arguments, path, **supplied)
