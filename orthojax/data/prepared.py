"""Finding prepared TFDS image-classification sets, and reading them, without TensorFlow."""

import contextlib
import dataclasses
import difflib
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from orthojax import checks
from orthojax.caches import expand
from orthojax.data.records import Records
from orthojax.errors import DatasetError

_PROGRESS_SECONDS = 1.0  # what is over sooner says nothing
# TFDS takes the path of a set for a pattern, and array_record one with a line break for none.
_UNREADABLE = re.compile(r"[\[*?\0\n\r\ud800-\udfff]")
# `kaggle:name` and the like: sets whose code TFDS fetches. After a name's colon is a version.
_FOREIGN = re.compile(r"[\w\-]+:[^\d*]")

_REENCODED = re.compile(r"(?P<name>\w+)_(?P<size>[1-9]\d*)(?P<rest>[/:].*)?")


@dataclasses.dataclass(frozen=True)
class Source:
    """A prepared TFDS set: `tfds.data_source` of its splits, and which features to read."""

    builder: Any
    image_key: str
    label_key: str

    @property
    def full_name(self) -> str:
        """TFDS's full name, such as `cifar10/3.0.2` or `cifar10_corrupted/fog_1/1.0.0`."""
        return self.builder.info.full_name

    @property
    def directory(self) -> str:
        """The directory that holds the records."""
        return os.fspath(self.builder.data_path)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C); H and W are None where images are of many sizes."""
        return self.builder.info.features[self.image_key].shape

    @property
    def num_classes(self) -> int:
        """Labels are 0 to `num_classes - 1`."""
        return self.builder.info.features[self.label_key].num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each label; empty where the set has no more than numbers."""
        return tuple(self.builder.info.features[self.label_key].names or ())


def find(name: str, data_dir: str | None, *, prepared: bool = True) -> Source:
    """Looks a data set up by its TFDS name; `digits` and `mnist5000` are prepared on the way.

    Args:
      name: as `tfds.builder` takes it: `cifar10`, `cifar10:3.0.2`, `cifar10_corrupted/fog_1`; or
        the name of what `orthojax.data.reencode` made of such a set, `imagenet2012_256`.
      data_dir: TFDS data directory; None is TFDS's default, `$TFDS_DATA_DIR` or
        `~/tensorflow_datasets`.
      prepared: whether there must be records. Where there need not be, and are not, a re-encoded
        set is found as its original, which has the same features.

    Raises:
      DatasetError: the name is unknown; the set is not prepared, or not as `array_record`; it is
        not one of uint8 images with one class label each.
    """
    from orthojax.data import bundled  # here, so that importing orthojax.data does not import TFDS

    builder = _builder(name, data_dir)
    if builder is None and not prepared:
        builder = _original(name, data_dir)
    if builder is None:
        raise _unknown(name, data_dir)
    if prepared:
        if isinstance(builder, bundled.Bundled) and not is_prepared(builder):
            bundled.prepare(builder)
        check_prepared(name, builder)
    return _checked_source(name, builder)


def named_builder(name: str, data_dir: str | None) -> Any:
    """The `tfds.core.DatasetBuilder` of a name; `DatasetError` names the nearest if it is unknown.

    Args:
      name: see `find`.
      data_dir: see `find`.
    """
    builder = _builder(name, data_dir)
    if builder is None:
        raise _unknown(name, data_dir)
    return builder


def reencoded_name(name: str, size: int) -> str:
    """The name of a set of which `orthojax.data.reencode` made squares.

    Args:
      name: of the original, without config and version.
      size: side of the squares in pixels.

    Example:
      >>> reencoded_name("imagenet2012", 256)
      'imagenet2012_256'
    """
    return f"{name}_{size}"


def _builder(name: str, data_dir: str | None) -> Any | None:
    """The builder of a name; None if TFDS knows neither code nor files of it."""
    import tensorflow_datasets as tfds

    from orthojax.data import bundled  # noqa: F401  (defining classes registers them with TFDS)

    if not isinstance(name, str):
        raise checks.refuse("name", name, "the name of a data set, such as 'cifar10'")
    if not isinstance(data_dir, str | os.PathLike | None):
        raise checks.refuse("data_dir", data_dir, "the path of a directory, or None")
    given = data_dir or os.environ.get("TFDS_DATA_DIR")
    place = expand(os.fspath(given or "~/tensorflow_datasets"))  # which is TFDS's own choice
    data_dir = place if given else None
    if _FOREIGN.match(name):
        raise DatasetError(
            f"data set {name!r} is another repository's, whose code would be fetched and run; "
            "prepare it with TFDS, and name it without what is before the colon"
        )
    _check_readable(data_dir or "")
    try:
        with quiet(), _no_strange_features(name):
            builder = tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        return None
    except DatasetError:
        raise
    # What TFDS raises for unknown versions and configs, and for damaged descriptions of sets.
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DatasetError(f"data set {name!r} cannot be used: {reason}") from error
    _check_readable(os.fspath(builder.data_path))
    return builder


def _check_readable(directory: str) -> None:
    found = _UNREADABLE.search(directory)
    if found:
        raise DatasetError(
            f"data_dir: TFDS reads nothing below a directory with {found[0]!r} in its name, as in "
            f"{directory!r}; rename it, or name a link to it"
        )


@contextlib.contextmanager
def _no_strange_features(name: str) -> Iterator[None]:
    """Keeps TFDS from importing what a set's `features.json` names, which runs it.

    TFDS's own features are known, and those of modules that are imported already.
    """
    import tensorflow_datasets as tfds

    connector = tfds.features.FeatureConnector
    original = connector.__dict__["cls_from_name"]

    def known(python_name: str) -> Any:
        module = python_name.rpartition(".")[0]
        if module and not (module.startswith("tensorflow_datasets.") or module in sys.modules):
            raise DatasetError(
                f"data set {name!r}: its features.json names the class {python_name!r}, and "
                f"reading it would run the module {module!r}; import that first if you trust it, "
                "or write the set with TFDS's own features"
            )
        return original.__get__(None, connector)(python_name)

    connector.cls_from_name = staticmethod(known)
    try:
        yield
    finally:
        connector.cls_from_name = original


def _original(name: str, data_dir: str | None) -> Any | None:
    """The builder of what a set of this name is re-encoded from; None for any other name."""
    parts = _REENCODED.fullmatch(name)
    if parts is None:
        return None
    original = parts["name"] + (parts["rest"] or "")
    try:
        builder = _builder(original, data_dir)
        if builder is not None and None in _checked_source(original, builder).image_shape:
            return builder
    except DatasetError:  # no such version, or another kind of set
        pass
    return None


def _unknown(name: str, data_dir: str | None) -> DatasetError:
    import tensorflow_datasets as tfds

    original = _original(name, data_dir)
    if original is not None:
        parts = _REENCODED.fullmatch(name)
        command = prepare_command(parts["name"] + (parts["rest"] or ""), original)
        return DatasetError(
            f"data set {name!r} is not prepared in {original.data_dir_root}; prepare it with\n"
            f"    {command} --resize={parts['size']}"
        )
    # Without the community sets, whose list TFDS reads through TensorFlow.
    known = tfds.list_builders(with_community_datasets=False)
    nearest = difflib.get_close_matches(name, known, n=3)
    hint = (
        f"did you mean {' or '.join(nearest)}?"
        if nearest
        else "choose digits, mnist5000, cifar10, svhn_cropped, or another of TFDS's"
    )
    return DatasetError(f"unknown data set {name!r}; {hint}")


def is_prepared(builder: Any) -> bool:
    """Whether there are records of any format where `builder` looks for them."""
    with quiet():
        return builder.is_prepared()


def check_prepared(name: str, builder: Any) -> None:
    """Raises `DatasetError`, with the command to run, where there are no `array_record` files."""
    if not is_prepared(builder):
        raise DatasetError(
            f"data set {name!r} is not prepared in {builder.data_dir_root}; {_nearby(builder)}"
            f"prepare it with\n    {prepare_command(name, builder)}"
        )
    splits = list(builder.info.splits)
    if not splits:
        raise DatasetError(f"{builder.data_path} holds no split; name another data_dir")
    try:
        builder.as_data_source(split=splits[0])
    except (NotImplementedError, ValueError) as error:
        raise DatasetError(
            f"{builder.data_path} holds another format than array_record, which only TensorFlow "
            "reads; name another data_dir, or remove that directory, and prepare the set with\n"
            f"    {prepare_command(name, builder)}"
        ) from error


def _nearby(builder: Any) -> str:
    """Where a set that is not prepared was looked for, and what is there instead."""
    place, root = os.fspath(builder.data_path), os.fspath(builder.data_dir_root)
    looked = f"looked for {place}; "
    if "://" in place:
        return looked
    if not os.path.isdir(root):
        return f"there is no such directory; {looked}"
    with contextlib.suppress(OSError):
        versions = [p.parent.name for p in pathlib.Path(place).parent.glob("*/dataset_info.json")]
        if versions:
            found = ", ".join(sorted(versions))
            return (
                f"{looked}there is version {found}: take it by dataset.name="
                f"{builder.name}:{versions[0]}, or "
            )
        relative = os.path.relpath(place, root)
        above, below = pathlib.Path(root).absolute().parents[:3], pathlib.Path(root).glob("*/")
        for other in (*above, *below):
            if (other / relative / "dataset_info.json").exists():
                return f"{looked}it is in {other}: take data_dir={other}, or "
    return looked


def prepare_command(name: str, builder: Any) -> str:
    """The shell command that prepares a set where `builder` looks for it."""
    command = ["orthojax", "prepare", name, f"--data_dir={builder.data_dir_root}"]
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        command.append("--manual_dir=WHERE_THE_ARCHIVES_ARE")
    return shlex.join(command)


def records(source: Source, split: str) -> Records:
    """Where the records of a split are.

    Args:
      source: from `find`.
      split: a TFDS split, sliced or not: `train`, `train[:90%]`, `train[1000:]+test`.

    Raises:
      DatasetError: there is no such split, or it is empty.
    """
    instructions = _checked_split(source, split).file_instructions
    shards = tuple(f"{i.filename}[{i.skip}:{i.skip + i.take}]" for i in instructions if i.take)
    size = sum(i.take for i in instructions)
    keys = source.image_key, source.label_key
    return Records(split, source.directory, shards, size, *keys, source.num_classes)


def size(source: Source, split: str) -> int:
    """How many images a split has; see `records`."""
    return _checked_split(source, split).num_examples


def decode(source: Source, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Decodes every image of a split, in the order of its records, with a progress line on stderr.

    Args:
      source: from `find`.
      split: a TFDS split, sliced or not: `train`, `train[:90%]`, `train[1000:]+test`.

    Returns:
      Images uint8 (N, H, W, C) and labels int32 (N,).

    Raises:
      DatasetError: there is no such split, it is empty, its records cannot be read, or a label is
        outside the classes.
    """
    encoded = records(source, split)
    images = np.empty((len(encoded), *source.image_shape), np.uint8)
    labels = np.empty(len(encoded), np.int32)
    title = f"decoding {source.full_name} {split}"
    progress = tqdm.tqdm(
        range(len(encoded)), title, unit="images", delay=_PROGRESS_SECONDS, mininterval=1
    )
    for row in progress:
        image, labels[row] = encoded[row]
        images[row] = _decode_image(source, split, row, image)
    return images, labels


def _decode_image(source: Source, split: str, row: int, encoded: bytes) -> np.ndarray:
    from orthojax.data import jpeg

    try:
        image = jpeg.decode(encoded, channels=source.image_shape[-1])
        if image.shape != source.image_shape:
            raise jpeg.UndecodableError(f"of shape {image.shape}, and not {source.image_shape}")
    except jpeg.UndecodableError as error:
        raise DatasetError(
            f"record {row} of split {split!r} in {source.directory} is no image of this set "
            f"({error}); remove that directory and prepare the set again"
        ) from error
    return image


def check_split_name(argument: str, split: Any) -> None:
    """Raises `ConfigError` for what is no name of a split, or of a slice of one."""
    if not isinstance(split, str) or not split:
        raise checks.refuse(argument, split, "the name of a split, such as 'train'")


def _checked_split(source: Source, split: str) -> Any:
    check_split_name("split", split)
    try:
        found = source.builder.info.splits[split]
        size = found.num_examples
    except (ValueError, KeyError) as error:
        raise DatasetError(f"split {split!r} of {source.full_name}: {error}") from error
    if not size:
        raise DatasetError(
            f"split {split!r} of {source.full_name} holds no image; choose a larger one"
        )
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences TFDS's warnings, which are about OpenCV, and about directories that do not exist."""
    from absl import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _checked_source(name: str, builder: Any) -> Source:
    import tensorflow_datasets as tfds

    image_key, label_key, *_ = builder.info.supervised_keys or ("image", "label")
    features = builder.info.features
    if not (
        _has(features, image_key, tfds.features.Image)
        and _has(features, label_key, tfds.features.ClassLabel)
    ):
        raise DatasetError(
            f"data set {name!r} is not of images with one class label each; its features are "
            f"{features}; choose an image-classification set"
        )
    image = features[image_key]
    if image.np_dtype != np.uint8:
        raise DatasetError(
            f"images of data set {name!r} are {image.np_dtype}; choose one of uint8 images"
        )
    if len(image.shape) != 3 or image.shape[-1] not in (1, 3, 4):
        raise DatasetError(
            f"images of data set {name!r} have the shape {image.shape}; choose one of single "
            "images of 1, 3 or 4 channels"
        )
    return Source(builder, image_key, label_key)


def _has(features: Any, key: Any, kind: type) -> bool:
    # TFDS's keys may be nested tuples or dicts of names, and its features one without a name.
    named = isinstance(key, str) and hasattr(features, "keys") and key in features
    return named and isinstance(features[key], kind)
