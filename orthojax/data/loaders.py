"""`load` and `fake_data` for any data set: in memory, or streamed from disk."""

from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from orthojax import checks
from orthojax.data import folder, in_memory, prepared, streamed
from orthojax.data.protocols import Dataset


def load(name: str, data_dir: str | None = None, **arguments: Any) -> Dataset:
    """Loads a data set that TFDS has prepared, or one of `orthojax.data.bundled`.

    Sets of images of one size, such as CIFAR-10, are decoded into memory; those of photographs of
    many sizes, such as ImageNet, are read while a net trains. TensorFlow is never imported.

    Args:
      name: `digits`, `mnist5000`; a TFDS name such as `cifar10`, `svhn_cropped`, `imagenet2012`;
        or `folder`, for pictures of one's own.
      data_dir: TFDS data directory; None is `$TFDS_DATA_DIR` or `~/tensorflow_datasets`. For
        `folder` it is DIR of `DIR/train/CLASS/*.jpg`.
      **arguments: of `load` in `orthojax.data.in_memory`, `.streamed` or `.folder`.

    Raises:
      DatasetError: see there.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as place:
      ...     digits = load("digits", place, cache_dir=place)
      >>> digits.image_shape, digits.train_size, digits.test_size, digits.num_classes
      ((8, 8, 1), 1437, 360, 10)
    """
    return implementation({"name": name, "data_dir": data_dir})(name, data_dir, **arguments)


def fake_data(name: str, data_dir: str | None = None, **arguments: Any) -> Dataset:
    """A data set's shapes without its records, for compiling and measuring programs.

    Args:
      name: see `load`; the other arguments too.

    Example:
      >>> fake_data("digits", downsample=2).image_shape, fake_data("imagenet2012").image_shape
      ((4, 4, 1), (224, 224, 3))
    """
    return load(name, data_dir, **arguments, records=False)


def implementation(section: Mapping) -> Callable[..., Dataset]:
    """What `load` calls for a set; its arguments are the keys of a config's section.

    Args:
      section: `name`, and `data_dir` if it has one.

    Raises:
      DatasetError: the name is unknown.
    """
    if not isinstance(section, Mapping | ConfigDict):
        raise checks.refuse("section", section, "a mapping with the key 'name'")
    name = section.get("name")
    if name == "folder":
        return folder.load
    if not isinstance(name, str):
        return in_memory.load  # binding says what is missing
    found = prepared.find(name, section.get("data_dir"), prepared=False)
    return streamed.load if None in found.image_shape else in_memory.load
