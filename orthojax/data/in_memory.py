"""A prepared data set decoded into memory, with the statistics that normalize it."""

import dataclasses
import os
from collections.abc import Iterator

import jax
import numpy as np

from orthojax import checks
from orthojax.data import cache, prepared
from orthojax.data.augmentation import augment, check_images, normalize
from orthojax.data.in_memory_batches import Batch, Split, TrainIterator, eval_batches
from orthojax.data.preprocessing import Preprocessing, named
from orthojax.data.protocols import Splits
from orthojax.data.validation import existing, held_out, split_off
from orthojax.errors import DatasetError

# On the scale 0 to 1. CIFAR's pixels deviate by 0.2 or more; those at the rim of a digit hardly
# ever do, and dividing by their own deviation would make one faint stroke the loudest input.
STD_FLOOR = 0.05

BLACK_IMAGES = 2**20

_CHUNK = 1024  # images, when summing over a split: bounds the memory of the wider integers


@dataclasses.dataclass(frozen=True)
class InMemoryDataset(Splits):
    """Two splits or three, and the per-pixel mean and standard deviation of the training images.

    See `orthojax.data.Dataset` for its methods.

    Shapes: `mean` and `std` float32 (H, W, C), of pixels on the scale 0 to 1 (that is, divided by
    255); `std` is nowhere below `STD_FLOOR`. Labels are 0 to `num_classes - 1`. `flip` says whether
    training images are mirrored at random. `validation` is None, or what was held out of the
    training split, of which `train` is the rest.
    """

    name: str
    train: Split
    test: Split
    num_classes: int
    mean: np.ndarray
    std: np.ndarray
    flip: bool = False
    class_names: tuple[str, ...] = ()
    validation: Split | None = None

    @property
    def preprocessing(self) -> Preprocessing:
        """See `orthojax.data.Dataset`."""
        names = named(self.class_names, self.num_classes)
        return Preprocessing(self.image_shape, names, self.mean, self.std)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.train.images.shape[1:]

    def train_batches(
        self, batch_size: int, seed: int, rows: np.ndarray | None = None
    ) -> TrainIterator:
        """See `orthojax.data.TrainIterator`."""
        return TrainIterator(self.train, batch_size, seed, rows)

    def validation_batches(
        self, batch_size: int, rows: np.ndarray | None = None
    ) -> Iterator[Batch]:
        """See `orthojax.data.eval_batches`."""
        return eval_batches(existing(self.validation), batch_size, rows)

    def test_batches(self, batch_size: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """See `orthojax.data.eval_batches`."""
        return eval_batches(self.test, batch_size, rows)

    def augment(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """See `orthojax.data.augment`."""
        return augment(images, key, mean=self.mean, std=self.std, flip=self.flip)

    def normalize(self, images: jax.Array) -> jax.Array:
        """See `orthojax.data.normalize`."""
        return normalize(images, mean=self.mean, std=self.std)


def load(
    name: str,
    data_dir: str | None = None,
    *,
    downsample: int = 1,
    train_split: str = "train",
    test_split: str = "test",
    validation: int | float = 0,
    cache_dir: str | None = None,
    flip: bool = False,
    records: bool = True,
) -> InMemoryDataset:
    """Loads an image-classification set that TFDS has prepared, or one of `orthojax.data.bundled`.

    The images are decoded the first time and cached as `.npz` files; a set prepared anew is decoded
    anew. TensorFlow is never imported.

    Args:
      name: `digits`, `mnist5000`, or a TFDS name such as `cifar10`, `svhn_cropped`, `mnist`.
      data_dir: TFDS data directory; None is `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.
      downsample: k averages k×k blocks of pixels, rounded to the nearest integer (a half to even).
      train_split: a TFDS split, which may be sliced, such as `train[:90%]`.
      test_split: likewise, such as `train[90%:]`.
      validation: training images to hold out, see `orthojax.data.validation.held_out`; neither
        batches nor the statistics of pixels have any of them.
      cache_dir: where decoded splits are kept; None is `$XDG_CACHE_HOME/orthojax/datasets`, or
        `~/.cache/orthojax/datasets`.
      flip: whether training images are mirrored at random.
      records: False needs no prepared set, and gives black images in no memory, of mean 0 and
        deviation 1, for compiling and measuring programs.

    Raises:
      DatasetError: the name or a split is unknown, the set is not prepared, or its images are not
        uint8, of one size, and divisible by `downsample`.
      ConfigError: an argument is of another kind, or `validation` leaves no image.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as place:
      ...     digits = load("digits", data_dir=place, cache_dir=place)
      >>> digits.train.images.shape, len(digits.test), digits.num_classes
      ((1437, 8, 8, 1), 360, 10)
    """
    checks.flag("flip", flip)
    checks.flag("records", records)
    checks.integer("downsample", downsample, 0)  # which divisors there are is said below
    for split_name, split in (("train_split", train_split), ("test_split", test_split)):
        prepared.check_split_name(split_name, split)
    if not isinstance(cache_dir, str | os.PathLike | None):
        raise checks.refuse("cache_dir", cache_dir, "the path of a directory, or None")
    found = prepared.find(name, data_dir, prepared=records)
    _check_shape(found, downsample)
    if not records:
        return _black(name, found, downsample, flip, validation)
    number = held_out(validation, prepared.size(found, train_split))
    train = _decoded(found, train_split, downsample, cache_dir)
    test = _decoded(found, test_split, downsample, cache_dir)
    held = None
    if number:
        train, held = _divided(train, number)
    return InMemoryDataset(
        name=name,
        train=Split(train["images"], train["labels"]),
        test=Split(test["images"], test["labels"]),
        num_classes=found.num_classes,
        mean=train["mean"],
        std=train["std"],
        flip=flip,
        class_names=found.class_names,
        validation=held,
    )


def _divided(train: cache.Arrays, number: int) -> tuple[cache.Arrays, Split]:
    """A training split without `number` of its images, and these."""
    kept, held = (
        {key: train[key][indices] for key in ("images", "labels")}
        for indices in split_off(len(train["labels"]), number)
    )
    mean, std = pixel_statistics(kept["images"])
    return {**kept, "mean": mean, "std": std}, Split(**held)


def _black(
    name: str, found: prepared.Source, downsample: int, flip: bool, validation: int | float
) -> InMemoryDataset:
    height, width, channels = found.image_shape
    shape = (height // downsample, width // downsample, channels)
    split = black_split(shape)
    mean, std = np.zeros(shape, np.float32), np.ones(shape, np.float32)
    held = split if held_out(validation, BLACK_IMAGES) else None
    classes = found.num_classes
    return InMemoryDataset(name, split, split, classes, mean, std, flip, validation=held)


def black_split(shape: tuple[int, int, int]) -> Split:
    """`BLACK_IMAGES` black images of a shape and of label 0, in no memory."""
    return Split(
        images=np.broadcast_to(np.uint8(0), (BLACK_IMAGES, *shape)),
        labels=np.broadcast_to(np.int32(0), (BLACK_IMAGES,)),
    )


def average_pool(images: np.ndarray, size: int) -> np.ndarray:
    """Averages `size`×`size` blocks of pixels, rounded to the nearest integer, a half to even.

    Rounding halves up would brighten CIFAR by an eighth of a gray level.

    Args:
      images: uint8 (N, H, W, C), H and W divisible by `size`.
      size: at least 1.

    Returns:
      uint8 (N, H / size, W / size, C).

    Raises:
      ConfigError: an argument is of another kind, or does not divide.

    Example:
      >>> average_pool(np.array([[1, 2], [3, 4]], np.uint8).reshape(1, 2, 2, 1), 2).item()
      2
    """
    check_images("images", images)
    size = checks.integer("size", size, 1)
    if images.shape[1] % size or images.shape[2] % size:
        raise checks.refuse("size", size, f"a divisor of both sides of {images.shape}")
    total = np.zeros(images[:, ::size, ::size].shape, np.float32)  # exact up to size 256
    for row in range(size):
        for column in range(size):
            total += images[:, row::size, column::size]
    return np.rint(total / size**2).astype(np.uint8)


def pixel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over images, for each pixel and channel.

    Summed in integers, hence exact and the same on every machine up to the last division.

    Args:
      images: uint8 (N, H, W, C), N at least 1.

    Returns:
      Mean and standard deviation (of the N images, not of a population they stand for), float32
      (H, W, C), of pixels on the scale 0 to 1; the second is at least `STD_FLOOR`.

    Raises:
      ConfigError: `images` are of another dtype or shape, or there is none.
    """
    check_images("images", images)
    if not len(images):
        raise checks.refuse("images", images, "one image at least")
    total = np.zeros(images.shape[1:], np.int64)
    squares = np.zeros(images.shape[1:], np.int64)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK].astype(np.int64)
        total += chunk.sum(axis=0)
        squares += (chunk**2).sum(axis=0)
    mean = total / len(images)
    variance = (len(images) * squares - total**2) / len(images) ** 2
    std = np.maximum(np.sqrt(variance) / 255, STD_FLOOR)
    return (mean / 255).astype(np.float32), std.astype(np.float32)


def _decoded(
    found: prepared.Source, split: str, downsample: int, cache_dir: str | None
) -> cache.Arrays:
    def build() -> cache.Arrays:
        if downsample > 1:  # pooling is quick and decoding is not: share the full size
            full = _decoded(found, split, 1, cache_dir)
            images, labels = average_pool(full["images"], downsample), full["labels"]
        else:
            images, labels = prepared.decode(found, split)
        mean, std = pixel_statistics(images)
        return {"images": images, "labels": labels, "mean": mean, "std": std}

    path = cache.entry(cache_dir, found.full_name, found.directory, split, downsample)
    return cache.read_or_build(path, cache.fingerprint(found.directory), build)


def _check_shape(found: prepared.Source, downsample: int) -> None:
    height, width, _ = found.image_shape
    if None in (height, width):
        raise DatasetError(
            f"images of {found.full_name} are of many sizes; only those of one fixed size can be "
            "held decoded in memory"
        )
    if downsample < 1 or height % downsample or width % downsample:
        raise DatasetError(
            f"downsample={downsample} does not divide the {height}×{width} images of "
            f"{found.full_name}; choose a common divisor of both sides"
        )
