"""Finding prepared TFDS image-classification sets, and reading them, without TensorFlow."""

import contextlib
import dataclasses
import difflib
import os
import pathlib
import re
import shlex
from collections.abc import Iterator
from typing import Any

import numpy as np
import tqdm

from orthojax.data.records import Records
from orthojax.errors import DatasetError
from orthojax.storage.paths import name_fault

_CHUNK = 1000  # images read at a time: few enough to show progress, enough to share the overhead
_PROGRESS_SECONDS = 1.0  # what is over sooner says nothing
_PNG = b"\x89PNG\r\n\x1a\n"

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

    data_dir = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "") or None
    if data_dir and (fault := name_fault(data_dir)):
        raise DatasetError(f"data_dir: {fault}")
    try:
        with quiet():
            return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        return None
    # What TFDS raises for unknown versions, for unknown configs, and for other repositories' sets.
    except (AssertionError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DatasetError(f"data set {name!r} cannot be used: {reason}") from error


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
    try:
        builder.as_data_source(split=next(iter(builder.info.splits)))
    except NotImplementedError as error:
        raise DatasetError(
            f"{builder.data_path} holds another format than array_record, which only TensorFlow "
            "reads; remove that directory, or name another data_dir, and prepare the set with\n"
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
    command = ["python", "launch/prepare_data.py", name, f"--data_dir={builder.data_dir_root}"]
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


def examples(source: Source, split: str) -> Any:
    """TFDS's data source of a split, with its images as they are encoded; see `reading`."""
    import tensorflow_datasets as tfds

    decoders = {source.image_key: tfds.decode.SkipDecoding()}
    return source.builder.as_data_source(split=split, decoders=decoders)


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
    import tensorflow_datasets as tfds

    size = _checked_split(source, split).num_examples
    # As they are stored: TFDS would take 16-bit values modulo 256.
    raw = {source.image_key: tfds.decode.SkipDecoding()}
    records = source.builder.as_data_source(split=split, decoders=raw)
    feature = source.builder.info.features[source.image_key]
    images = np.empty((size, *source.image_shape), np.uint8)
    labels = np.empty(size, np.int32)
    title = f"decoding {source.full_name} {split}"
    progress = tqdm.tqdm(
        total=size, desc=title, unit="images", delay=_PROGRESS_SECONDS, mininterval=1
    )
    with quiet(), progress:
        for start in range(0, size, _CHUNK):
            rows = range(start, min(start + _CHUNK, size))
            with reading(source):
                chunk = records.__getitems__(rows)
            for row, example in zip(rows, chunk, strict=True):
                images[row] = _decode_image(source, split, row, feature, example)
                labels[row] = example[source.label_key]
            progress.update(len(rows))
    outside = np.flatnonzero((labels < 0) | (labels >= source.num_classes))
    if len(outside):
        raise DatasetError(
            f"split {split!r} of {source.full_name} has the label {labels[outside[0]]} in record "
            f"{outside[0]}, and there are {source.num_classes} classes; choose a split with labels"
        )
    return images, labels


def _decode_image(source: Source, split: str, row: int, feature: Any, example: Any) -> np.ndarray:
    encoded = example[source.image_key]
    try:
        if encoded[:8] == _PNG and encoded[24] > 8:
            raise ValueError(f"a PNG of {encoded[24]} bits, and not of 8")
        image = feature.decode_example_np(encoded)
        if image.shape != source.image_shape:
            raise ValueError(f"of shape {image.shape}, and not {source.image_shape}")
    except Exception as error:  # the decoders raise what they like
        raise DatasetError(
            f"record {row} of split {split!r} in {source.directory} is no image of this set "
            f"({error}); remove that directory and prepare the set again"
        ) from error
    return image


def _checked_split(source: Source, split: str) -> Any:
    try:
        found = source.builder.info.splits[split]
        size = found.num_examples
    except ValueError as error:
        raise DatasetError(f"split {split!r} of {source.full_name}: {error}") from error
    if not size:
        raise DatasetError(
            f"split {split!r} of {source.full_name} holds no image; choose a larger one"
        )
    return found


@contextlib.contextmanager
def reading(source: Source) -> Iterator[None]:
    """Raises `DatasetError` for what reading a TFDS data source raises where it is damaged."""
    from google.protobuf.message import DecodeError

    try:
        yield
    except (RuntimeError, DecodeError) as error:  # no such file, too short, wrong hash; no example
        raise DatasetError(
            f"the records in {source.directory} are damaged or incomplete ({error}); remove that "
            "directory and prepare the set again"
        ) from error


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
    return Source(builder, image_key, label_key)


def _has(features: Any, key: Any, kind: type) -> bool:
    # TFDS's keys may be nested tuples or dicts of names, and its features one without a name.
    named = isinstance(key, str) and hasattr(features, "keys") and key in features
    return named and isinstance(features[key], kind)
