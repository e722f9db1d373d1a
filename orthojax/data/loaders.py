"""`load` and `fake_data` for any data set: in memory, or streamed from disk."""

from collections.abc import Callable, Mapping
from typing import Any

from orthojax.data import dataset, folder, source, streamed
from orthojax.data.protocols import Dataset


def load(name: str, data_dir: str | None = None, **arguments: Any) -> Dataset:
    """Loads a data set that TFDS has prepared, or `digits`, which needs no such.

    Sets of images of one size, such as CIFAR-10, are decoded into memory; those of photographs of
    many sizes, such as ImageNet, are read while a net trains. TensorFlow is never imported.

    Args:
      name: `digits`; a TFDS name such as `cifar10`, `svhn_cropped`, `imagenet2012`; or `folder`,
        for pictures of one's own.
      data_dir: TFDS data directory; None is `$TFDS_DATA_DIR` or `~/tensorflow_datasets`. For
        `folder` it is DIR of `DIR/train/CLASS/*.jpg`.
      **arguments: of `load` in `orthojax.data.dataset`, `.streamed` or `.folder`.

    Raises:
      DatasetError: see there.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as place:
      ...     digits = load("digits", place, cache_dir=place)
      >>> digits.image_shape, digits.train_size, digits.test_size, digits.num_classes
      ((8, 8, 1), 1437, 360, 10)
    """
    section = {"name": name, "data_dir": data_dir}
    return implementation(load, section)(name, data_dir, **arguments)


def fake_data(name: str, data_dir: str | None = None, **arguments: Any) -> Dataset:
    """A data set's shapes without its records, for compiling and measuring programs.

    Args:
      name: see `load`; the other arguments too.

    Example:
      >>> fake_data("digits", downsample=2).image_shape, fake_data("imagenet2012").image_shape
      ((4, 4, 1), (224, 224, 3))
    """
    section = {"name": name, "data_dir": data_dir}
    return implementation(fake_data, section)(name, data_dir, **arguments)


def implementation(function: Callable[..., Dataset], section: Mapping) -> Callable[..., Dataset]:
    """What `load` or `fake_data` calls for a set; its arguments are the keys of a config's section.

    Args:
      function: `load` or `fake_data`; any other function is returned as it is.
      section: `name`, and `data_dir` if it has one.

    Raises:
      DatasetError: the name is unknown.
    """
    if function not in (load, fake_data):
        return function
    module = dataset
    if section.get("name") == "folder":
        module = folder
    elif isinstance(section.get("name"), str):  # else binding says what is missing
        found = source.find(section["name"], section.get("data_dir"), prepared=False)
        module = streamed if None in found.image_shape else dataset
    return getattr(module, function.__name__)
