"""From a working directory to the trained net in it, without its data set."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp

from orthojax.config.sections import bind
from orthojax.data import preprocessing
from orthojax.data.preprocessing import Preprocessing
from orthojax.errors import ConfigError, DatasetError, WorkdirError
from orthojax.sites import SITE
from orthojax.storage.checkpoint import layout
from orthojax.storage.paths import to_path
from orthojax.storage.saved import POSITION, layout_differences, read_saved
from orthojax.storage.workdir import CONFIG, read_run_file
from orthojax.training.experiment import Settings, net_of
from orthojax.training.net import MODELS

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A trained net, on one device.

    Attributes:
      net: a linen module without modulation sites, which have done their work.
      variables: its `params` and `batch_stats`.
      preprocessing: of images; it has the names of the classes.
      step: of the checkpoint.
    """

    net: Any
    variables: Mapping[str, Any]
    preprocessing: Preprocessing
    step: int

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each logit."""
        return self.preprocessing.class_names


def read_trained(
    workdir: str | os.PathLike, step: int | str = "latest", own_net: str | None = None
) -> Trained:
    """Reads the net of a run, which may be training; see `orthojax.load_classifier`.

    Raises:
      WorkdirError: there is no run, no such step, something of it is damaged, or its net is none of
        `orthojax.models` and not `own_net`.
    """
    workdir = to_path(workdir)
    settings = read_settings(workdir)
    name = settings.model.get("name")
    if name not in MODELS and name != own_net:
        raise WorkdirError(
            f"the net of {workdir} is {name!r}: reading it runs that module. If you trust it, say "
            f"so: load_classifier(workdir, own_net={name!r}), or --own_net={name} on a command line"
        )
    images = _images(workdir)
    net = explained_by(workdir, lambda: net_of(settings, len(images.class_names), modulated=False))
    variables, number = read_saved(
        workdir / "checkpoints",
        step,
        lambda checkpoint: restore_variables(checkpoint, net, images.image_shape),
    )
    return Trained(net, variables, images, number)


def read_settings(workdir: Any) -> Settings:
    """The config of a run.

    Raises:
      WorkdirError: there is no run, or its config is damaged or of another version.
    """
    return explained_by(workdir, lambda: bind(Settings, read_run_file(workdir, CONFIG), ""))


def explained_by(workdir: Any, make: Callable[[], T]) -> T:
    """Says of an error in the config of a run that it is that run's."""
    try:
        return make()
    except ConfigError as error:
        raise WorkdirError(f"{workdir / CONFIG}: {error}") from error


def _images(workdir: Any) -> Preprocessing:
    values = read_run_file(workdir, preprocessing.FILE)
    try:
        return Preprocessing.from_json(values)
    except DatasetError as error:
        raise WorkdirError(f"{workdir / preprocessing.FILE}: {error}") from error


def restore_variables(checkpoint: Any, net: Any, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """The `params` and `batch_stats` of a net out of a checkpoint, and nothing else of it.

    Args:
      checkpoint: directory of one step.
      net: a linen module; sites, which it does not have, are left out.
      image_shape: (H, W, C).

    Raises:
      WorkdirError: the checkpoint is of another model; the message names the parameters.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    shapes = jax.eval_shape(
        lambda key, images: net.init(key, images, train=False), jax.random.key(0), images
    )
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {
        name: jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device),
            shapes.get(name, {}),
        )
        for name in ("params", "batch_stats")
    }
    saved = {
        leaf: kind
        for leaf, kind in json.loads((checkpoint / POSITION).read_bytes())["layout"].items()
        if leaf.split("/")[0] in wanted and SITE not in leaf.split("/")
    }
    if different := layout_differences(saved, layout(wanted)):
        raise WorkdirError(f"it is no checkpoint of the model in {CONFIG}:{different}")
    restore = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        found = reader.restore(checkpoint / "state", args=restore)
    return {name: tree for name, tree in found.items() if tree}
