"""Sets of photographs of many sizes, such as ImageNet: read from disk while a net trains."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from orthojax import checks
from orthojax.data import prepared
from orthojax.data.augmentation import augment_photographs, standardize_rgb
from orthojax.data.in_memory import BLACK_IMAGES, black_split
from orthojax.data.in_memory_batches import Split, TrainIterator, eval_batches
from orthojax.data.preprocessing import Preprocessing, named
from orthojax.data.protocols import Batch, Splits, TrainBatches
from orthojax.data.records import Records, check_images
from orthojax.data.validation import existing, parts
from orthojax.extras import require
from orthojax.parallel.cores import usable_cores

LARGEST_SIDE = 2**14  # of a square, in pixels


@dataclasses.dataclass(frozen=True)
class StreamedDataset(Splits):
    """Photographs scaled to a square, cropped at random, and augmented on the device.

    See `orthojax.data.Dataset` for its methods, and `load` for the attributes.
    """

    name: str
    train: Records
    test: Records
    num_classes: int
    resize: int
    crop: int
    flip: bool
    color_std: float
    workers: int
    threads: int
    class_names: tuple[str, ...] = ()
    validation: Records | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """See `orthojax.data.Dataset`."""
        names = named(self.class_names, self.num_classes)
        return Preprocessing(self.image_shape, names, resize=self.resize)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C) of a crop."""
        return self.crop, self.crop, 3

    def train_batches(
        self, batch_size: int, seed: int, rows: np.ndarray | None = None
    ) -> TrainBatches:
        """See `orthojax.data.Dataset`; worker processes start with the first batch."""
        from orthojax.data import streamed_batches  # here, because Grain takes a second to import

        return streamed_batches.StreamedTrainIterator(
            self.train, self._geometry(), batch_size, seed, rows, **self._processes()
        )

    def validation_batches(
        self, batch_size: int, rows: np.ndarray | None = None
    ) -> Iterator[Batch]:
        """See `orthojax.data.Dataset`, and `test_batches`."""
        return self._one_pass(existing(self.validation), batch_size, rows)

    def test_batches(self, batch_size: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """See `orthojax.data.Dataset`; an image that cannot be decoded counts as padding."""
        return self._one_pass(self.test, batch_size, rows)

    def augment(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """See `orthojax.data.augmentation.augment_photographs`."""
        return augment_photographs(images, key, flip=self.flip, color_std=self.color_std)

    def normalize(self, images: jax.Array) -> jax.Array:
        """See `orthojax.data.augmentation.standardize_rgb`."""
        return standardize_rgb(images)

    def _one_pass(
        self, records: Records, batch_size: int, rows: np.ndarray | None
    ) -> Iterator[Batch]:
        from orthojax.data import streamed_batches

        return streamed_batches.one_pass(
            records, self._geometry(), batch_size, rows, **self._processes()
        )

    def _geometry(self):
        from orthojax.data.streamed_batches import Geometry

        return Geometry(self.resize, self.crop)

    def _processes(self) -> dict[str, int]:
        return {"workers": self.workers, "threads": self.threads}


class BlackDataset(StreamedDataset):
    """The same without records: black images."""

    def train_batches(
        self, batch_size: int, seed: int, rows: np.ndarray | None = None
    ) -> TrainBatches:
        """See `orthojax.data.Dataset`."""
        return TrainIterator(self._black(), batch_size, seed, rows)

    def _one_pass(
        self, records: Records, batch_size: int, rows: np.ndarray | None
    ) -> Iterator[Batch]:
        return eval_batches(self._black(), batch_size, rows)

    def _black(self) -> Split:
        return black_split(self.image_shape)


def load(
    name: str,
    data_dir: str | None = None,
    *,
    train_split: str = "train",
    test_split: str = "validation",
    validation: int | float = 0,
    resize: int = 256,
    crop: int = 224,
    flip: bool = True,
    color_std: float = 0.1,
    workers: int | None = None,
    threads: int = 1,
    records: bool = True,
) -> StreamedDataset:
    """Opens a set of photographs that TFDS has prepared, such as `imagenet2012`.

    Training images are scaled to a square of side `resize`, whatever their aspect ratio, and a
    random square of side `crop` is cut from it; test images are cut in the center. What is
    random on the host is a function of the seed and the position in the stream, so neither the
    number of workers nor that of hosts changes an image.

    Args:
      name: a TFDS name, or `imagenet2012_256`, which `orthojax prepare --resize=256` makes.
      data_dir: TFDS data directory; None is `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      train_split: a TFDS split, which may be sliced, such as `train[:90%]`.
      test_split: likewise.
      validation: training images to hold out, see `orthojax.data.validation.held_out`.
      resize: in pixels.
      crop: in pixels, at most `resize`; what the net sees.
      flip: whether training images are mirrored at random.
      color_std: of the coefficients of AlexNet's color augmentation; 0 for none.
      workers: processes that decode; None is one for each core this process may use, and 0 decodes
        in threads of this process.
      threads: of each worker; more than one where reading has to wait for a distant disk.
      records: False needs no prepared set and none of the packages, and gives black images.

    Raises:
      DatasetError: the name or a split is unknown, the set is not prepared, a package is missing,
        or not one of the first images can be decoded.
      ConfigError: an argument is of another kind or out of range.

    Example:
      >>> load("imagenet2012", records=False).image_shape
      (224, 224, 3)
    """
    found = prepared.find(name, data_dir, prepared=records)
    arguments = checked_arguments(resize, crop, flip, color_std, workers, threads)
    if not records:
        keys = found.image_key, found.label_key
        nothing = Records("", "", (), BLACK_IMAGES, *keys, found.num_classes)
        train, held = parts(nothing, validation)
        return BlackDataset(name, train, nothing, found.num_classes, **arguments, validation=held)
    require("imagenet", f"reading {name!r}")
    train, test = (prepared.records(found, split) for split in (train_split, test_split))
    train, held = parts(train, validation)
    check_images(train)
    check_images(test)
    return StreamedDataset(
        name,
        train,
        test,
        found.num_classes,
        class_names=found.class_names,
        validation=held,
        **arguments,
    )


def checked_arguments(
    resize: int, crop: int, flip: bool, color_std: float, workers: int | None, threads: int
) -> dict[str, Any]:
    """The arguments that a `StreamedDataset` has of these; `ConfigError` if one is impossible."""
    checks.number("color_std", color_std, "[0, inf)")
    checks.flag("flip", flip)
    resize = checks.integer("resize", resize, 1, LARGEST_SIDE)
    return {
        "resize": resize,
        "crop": checks.integer("crop", crop, 1, resize),
        "flip": flip,
        "color_std": color_std,
        "workers": usable_cores() if workers is None else checks.integer("workers", workers, 0),
        "threads": checks.integer("threads", threads, 1),
    }
