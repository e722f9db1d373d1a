"""A config, checked and built into everything that stays the same during training."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.dynamic_scale import DynamicScale
from jax.sharding import Mesh

from orthojax import data
from orthojax.config.sections import bind
from orthojax.errors import ConfigError
from orthojax.linen import axes
from orthojax.models import ConvNet
from orthojax.parallel.mesh import batch_sharding, make_mesh
from orthojax.sites.modulation import modulation
from orthojax.training.net import check_logits, explained, make_net
from orthojax.training.optimizers import check_arguments, make_optimizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keys of a config. Sections are bound to the function or class that they configure.

    Attributes:
      dataset: `name` and the arguments of what loads that set, `orthojax.data.in_memory.load` into
        memory or `orthojax.data.streamed.load` from disk; all take `validation`, a fraction or a
        number of the training images to hold out.
      model: `name`, a class of `orthojax.models` or `package.module:Net`, and the arguments of that
        class.
      modulation: None, or the arguments of `orthojax.modulation`; None is that argument's default.
      optimizer: see `orthojax.training.optimizers.make_optimizer`.
      schedule: see there.
      regularizer: see there.
      constraint: None, or the arguments of `orthojax.stiefel`; see there.
      steps: number of updates.
      batch_size: images per update, over all devices.
      seed: of the initialization, the order of the data and the augmentation.
      clip_grad_norm: the largest norm of the gradient, or None; inside modulation, so that it is
        of the modulated gradient.
      dtype: compute dtype of the net: "float32", "bfloat16" or "float16".
      loss_scale: None, or the arguments of `flax.training.dynamic_scale.DynamicScale`, such as
        `scale` and `growth_interval`; float16 needs it, unless `modulation` keeps the error in
        range.
      log_every: steps between records and progress lines.
      eval_every: steps between evaluations, and there is always one at the end: on the validation
        split, which then chooses the best checkpoint, and on the test split once, at the end; or,
        without one, on the test split, which chooses nothing.
      patience: None, or after how many evaluations without a better validation accuracy training
        ends. It may change when a run goes on.
      checkpoint_every: steps between checkpoints; there is always one at the end.
      observe_every: steps between records of the layers (`orthojax.training.observe`); 0 is never.
      recalibrate_bn: evaluate with the BN statistics of one pass over this many training images at
        once; 0 takes the running ones, which a deep net from a chaotic start cannot use. It may
        change when a run goes on; accuracies before and after are not compared.
      init_from: None, or the working directory of another run, whose last checkpoint gives the
        weights to begin with; see `orthojax.training.fine_tune`.
      keep_checkpoints: how many of the newest are kept.
      tensorboard: write TensorBoard events too (extra `[tensorboard]`).
      mesh: `data` and `fsdp`, see `orthojax.parallel.mesh.make_mesh`. What is computed does not
        depend on it, so a run may go on with another one.
    """

    dataset: Mapping
    model: Mapping
    modulation: Mapping | None
    optimizer: Mapping
    schedule: Mapping
    regularizer: Mapping
    steps: int
    batch_size: int
    seed: int = 0
    constraint: Mapping | None = None
    clip_grad_norm: float | None = None
    dtype: str = "float32"
    loss_scale: Mapping | None = None
    log_every: int = 10
    eval_every: int = 100
    patience: int | None = None
    checkpoint_every: int = 100
    observe_every: int = 0
    recalibrate_bn: int = 0
    init_from: str | None = None
    keep_checkpoints: int = 3
    tensorboard: bool = False
    mesh: Mapping = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for key in (
            *("steps", "batch_size", "log_every", "eval_every", "checkpoint_every"),
            "keep_checkpoints",
        ):
            if getattr(self, key) < 1:
                raise ConfigError(f"`{key}` is {getattr(self, key)}; it must be at least 1")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise ConfigError(f"`clip_grad_norm` is {self.clip_grad_norm}; it must be above 0")
        if self.patience is not None and self.patience < 1:
            raise ConfigError(
                f"`patience` is {self.patience}; it must be None or at least 1 evaluation"
            )
        if self.patience is not None and not dict(self.dataset).get("validation"):
            raise ConfigError(
                f"`patience` is {self.patience}, and there is no validation split that could "
                "tell when to end; set `dataset.validation`, such as to 0.1, or `patience` to None"
            )
        for key in ("observe_every", "recalibrate_bn"):
            if getattr(self, key) < 0:
                raise ConfigError(f"`{key}` is {getattr(self, key)}; it must be at least 0")
        alone = self.loss_scale is None and self.modulation is None
        if alone and _dtype(self.dtype) == np.float16:
            raise ConfigError(
                "`dtype` is float16, whose gradients may underflow; set `loss_scale` to {} for a "
                "dynamic one, or `modulation`, or take bfloat16, which needs neither"
            )
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"`seed` is {self.seed}; it must be from 0 to {2**32 - 1}")


class TracedHyperparams(NamedTuple):
    """What of a config the compiled programs are given, rather than have in them.

    Runs that differ in these alone, such as seeds and a sweep of learning rates, are one program:
    it is compiled once, and the compilation cache has it for the others.

    Attributes:
      seed: uint32 scalar.
      learning_rate: float32 scalar, of the optimizer, that the schedule starts from.
      coefficient: float32 scalar, of the regularizer; 0 where it has none.
    """

    seed: Any
    learning_rate: Any
    coefficient: Any


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a config stands for, built: everything that does not change during training.

    Attributes:
      settings: the config itself.
      dataset: the images, in memory or streamed.
      net: the model.
      schedule: the learning rate as a function of the step.
      mesh: the devices.
    """

    settings: Settings
    dataset: data.Dataset
    net: nn.Module
    schedule: optax.Schedule
    mesh: Mesh

    @property
    def hyperparams(self) -> TracedHyperparams:
        """The config's own, as NumPy scalars."""
        return TracedHyperparams(
            np.uint32(self.settings.seed % 2**32),
            np.float32(self.settings.optimizer["learning_rate"]),
            np.float32(dict(self.settings.regularizer).get("coefficient", 0.0)),
        )

    @property
    def loss_scale(self) -> DynamicScale | None:
        """The first one."""
        section = self.settings.loss_scale
        return None if section is None else bind(DynamicScale, section, "loss_scale")

    def optimizer(self, hyperparams: TracedHyperparams) -> optax.GradientTransformation:
        """Regularizer and optimizer, chained, with hyperparameters that may be traced."""
        return _optimizer_and_schedule(self.settings, self.mesh, hyperparams, self.view)[0]

    @functools.cached_property
    def view(self) -> Callable[[Any], Any] | None:
        """What somebody's net says of its parameters called `kernel`; None: `views.flax()`."""
        if isinstance(self.net, ConvNet):
            return None
        images = jax.ShapeDtypeStruct((2, *self.dataset.image_shape), np.float32)
        said = axes(self.net, images, train=False)
        names = {path: path.rpartition("/")[2] for path in said}
        kernels = {p: said[p] if name == "kernel" else f"named {name}" for p, name in names.items()}
        return lambda params: kernels


def build(
    config: Mapping,
    *,
    devices: Sequence[jax.Device] | None = None,
    records: bool = True,
) -> Experiment:
    """Builds what a config describes; touches no working directory.

    Args:
      config: a Mapping or ConfigDict with the keys of `Settings`.
      devices: what the mesh is made of; None is `jax.devices()`.
      records: False gives black images, and the data set need not be prepared.

    Raises:
      ConfigError: a key is unknown, missing or impossible; the message names it.
      DatasetError: the data set is unknown, not prepared, or smaller than a batch.
    """
    settings = bind(Settings, config, "")
    mesh = bind(make_mesh, settings.mesh, "mesh", devices=devices)
    for key in ("batch_size", "recalibrate_bn"):
        batch_sharding(mesh, getattr(settings, key), key)
    optimizer, schedule = explained(
        "optimizer or regularizer", lambda: _optimizer_and_schedule(settings, mesh)
    )
    check_arguments(optimizer, "optimizer or regularizer")
    # Before the data: a bad depth should not wait for a data set to be decoded.
    modulated = settings.modulation is not None
    net = net_of(settings, 1, modulated=modulated)
    groups = getattr(net, "bn_groups", 1)
    if settings.batch_size % groups:
        raise ConfigError(
            f"`model.bn_groups`={groups} does not divide batch_size={settings.batch_size}"
        )
    if settings.recalibrate_bn and not isinstance(net, ConvNet):
        raise ConfigError(
            f"`recalibrate_bn` is {settings.recalibrate_bn}, which only nets of orthojax.models "
            "know; set it to 0"
        )
    dataset = bind(
        data.implementation(settings.dataset), settings.dataset, "dataset", records=records
    )
    if dataset.validation_size and settings.batch_size > dataset.train_size:
        raise ConfigError(
            f"`dataset.validation` is {settings.dataset['validation']}, which leaves "
            f"{dataset.train_size} training images for a batch_size of {settings.batch_size}; "
            "take less of either"
        )
    dataset.train_batches(settings.batch_size, settings.seed)  # fits, or says why not
    if settings.recalibrate_bn > dataset.train_size:
        raise ConfigError(
            f"`recalibrate_bn` is {settings.recalibrate_bn}; there are {dataset.train_size} "
            "training images"
        )
    net = net_of(settings, dataset.num_classes, modulated=modulated)
    check_logits(net, dataset.image_shape, dataset.num_classes)
    return Experiment(settings, dataset, net, schedule, mesh)


def _optimizer_and_schedule(
    settings: Settings,
    mesh: Mesh,
    hyperparams: TracedHyperparams | None = None,
    view: Callable[[Any], Any] | None = None,
):
    optimizer, regularizer = dict(settings.optimizer), dict(settings.regularizer)
    constraint = None if settings.constraint is None else dict(settings.constraint)
    reading = {"soap": optimizer, "ortho": regularizer, None: constraint}
    for name, section in reading.items():
        if view and section is not None and section.get("name") == name:
            section["view"] = section.get("view") or view
    if hyperparams is not None:
        optimizer["learning_rate"] = hyperparams.learning_rate
        if "coefficient" in regularizer:
            regularizer["coefficient"] = hyperparams.coefficient
    made, schedule = make_optimizer(
        optimizer=optimizer,
        schedule=settings.schedule,
        regularizer=regularizer,
        constraint=constraint,
        steps=settings.steps,
        clip_grad_norm=settings.clip_grad_norm,
        mesh=mesh,
    )
    if settings.modulation is not None:
        given = {k: v for k, v in dict(settings.modulation).items() if v is not None}
        made = explained("modulation", lambda: bind(modulation, given, "modulation", inner=made))
    return made, schedule


def net_of(settings: Settings, num_classes: int, *, modulated: bool) -> nn.Module:
    """The net of a config.

    Raises:
      ConfigError: see `build`.
    """
    dtype = _dtype(settings.dtype)
    return make_net(settings.model, modulated=modulated, dtype=dtype, num_classes=num_classes)


def _dtype(name: Any) -> np.dtype:
    dtype = explained("dtype", lambda: np.dtype(jax.numpy.dtype(name)))
    wide = dtype == np.float64 and jax.config.jax_enable_x64
    if not wide and dtype not in (np.float32, np.float16, jax.numpy.bfloat16):
        raise ConfigError(f"`dtype` is {dtype}; it must be float32, bfloat16 or float16")
    return dtype
