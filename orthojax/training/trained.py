"""From a working directory to the trained net in it, without its data set."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp

from orthojax.config.sections import bind
from orthojax.data import preprocessing
from orthojax.data.preprocessing import Preprocessing
from orthojax.errors import WorkdirError
from orthojax.storage.checkpoint import saved_accuracy, saved_steps
from orthojax.storage.checksums import find_damage
from orthojax.storage.paths import is_remote, to_path
from orthojax.storage.workdir import CONFIG
from orthojax.training.experiment import Settings, net_of


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


def read_trained(workdir: str | os.PathLike, step: int | str = "best") -> Trained:
    """Reads the net of a run; see `orthojax.load`.

    Raises:
      WorkdirError: there is no run, no such step, or the checkpoint is damaged.
    """
    workdir = to_path(workdir)
    settings = bind(Settings, _read(workdir, CONFIG), "")
    images = Preprocessing.from_json(_read(workdir, preprocessing.FILE))
    checkpoint, number = _checkpoint(workdir / "checkpoints", step)
    net = net_of(settings, len(images.class_names), modulated=False)
    return Trained(net, restore_variables(checkpoint, net, images.image_shape), images, number)


def restore_variables(checkpoint: Any, net: Any, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """The `params` and `batch_stats` of a net out of a checkpoint, and nothing else of it.

    Args:
      checkpoint: directory of one step.
      net: a linen module; what it does not have, such as sites, is left out.
      image_shape: (H, W, C).

    Raises:
      WorkdirError: the checkpoint is of another model.
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
    restore = ocp.args.PyTreeRestore(
        item=wanted,
        restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            found = reader.restore(checkpoint / "state", args=restore)
    except (ValueError, KeyError) as error:
        raise WorkdirError(
            f"{checkpoint} is not a checkpoint of the model in {CONFIG}: {error}"
        ) from error
    return {name: tree for name, tree in found.items() if tree}


def _read(workdir: Any, name: str) -> Any:
    try:
        return json.loads((workdir / name).read_bytes())
    except FileNotFoundError:
        if name == CONFIG or not (workdir / CONFIG).exists():
            raise WorkdirError(f"{workdir} holds no run (there is no {CONFIG} in it)") from None
        raise WorkdirError(
            f"{workdir} was trained before {name} was kept; start its training command once more, "
            "which writes it and trains no further"
        ) from None
    except (ValueError, OSError) as error:
        raise WorkdirError(f"{workdir / name} is damaged: {error}") from error


def _checkpoint(directory: Any, step: int | str) -> tuple[Any, int]:
    if not is_remote(directory):
        directory = directory.absolute()  # as orbax demands
    steps = saved_steps(directory)
    if not steps:
        raise WorkdirError(f"there is no checkpoint in {directory}")
    number = _chosen(directory, steps, step)
    checkpoint = directory / str(number)
    damage = None if is_remote(directory) else find_damage(checkpoint)
    if damage:
        raise WorkdirError(f"{checkpoint} is damaged ({damage}); choose another of {_list(steps)}")
    return checkpoint, number


def _chosen(directory: Any, steps: list[int], step: int | str) -> int:
    if step == "latest":
        return steps[-1]
    if step == "best":
        accuracies = {number: saved_accuracy(directory / str(number)) for number in steps}
        return max(steps, key=lambda number: (accuracies[number] or 0.0, number))
    if str(step).isdigit() and int(step) in steps:
        return int(step)
    raise WorkdirError(
        f"there is no checkpoint of step {step!r} in {directory}; choose best, latest or one of "
        f"{_list(steps)}"
    )


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps))
