"""A validation split, taken from the training images by a fixed rule.

Image k of it is one of stretch k of as many equal stretches of the training split, in the order of
its records. So classes that are sorted, or that take turns, all have their share; which image of a
stretch it is was drawn once and for all, and depends on the two sizes alone.
"""

import dataclasses
import numbers
from typing import Any, TypeVar

import numpy as np

from orthojax import checks
from orthojax.errors import ConfigError, DatasetError

_SEED = 2019  # of what is drawn; with another one a resumed run would train on other images

T = TypeVar("T")


def held_out(validation: int | float, size: int) -> int:
    """How many of `size` training images a validation split takes.

    Args:
      validation: 0 for none; a fraction in (0, 1), rounded to the nearest number of images; or
        their number; 1.0, which could be either, is refused.
      size: at least 1.

    Raises:
      ConfigError: it is none of these, or no image is left on a side.

    Example:
      >>> held_out(0, 1437), held_out(0.1, 1437), held_out(360, 1437)
      (0, 144, 360)
    """
    expected = (
        "0 for none, a fraction in (0, 1), or a number of images, so that it takes at least 1 and "
        f"at most {size - 1} of the {size} of the training split"
    )
    try:
        checks.number("validation", validation, "[0, inf)")
    except ConfigError:
        raise checks.refuse("validation", validation, expected) from None
    number = round(validation * size) if validation < 1 else int(validation)
    ambiguous = validation == 1 and not isinstance(validation, numbers.Integral)
    broken = validation > 1 and number != validation
    if ambiguous or broken or (validation and not 0 < number < size):
        raise checks.refuse("validation", validation, expected)
    return number


def split_off(size: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `size` images stay for training, and which `number` of them are held out.

    Returns:
      Two int64 arrays of indices in ascending order, which together are `range(size)`.

    Example:
      >>> [indices.tolist() for indices in split_off(10, 3)]
      [[0, 2, 4, 5, 6, 7, 8], [1, 3, 9]]
    """
    edges = np.arange(number + 1, dtype=np.uint64) * np.uint64(size) // np.uint64(max(number, 1))
    words = np.random.Philox(np.random.SeedSequence(_SEED)).random_raw(number)
    held = (edges[:-1] + words % np.diff(edges)).astype(np.int64)
    return np.delete(np.arange(size), held), held


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some records of a split, which stand for `orthojax.data.records.Records`.

    Attributes:
      whole: the split, its `Records` or `orthojax.data.folder.Files`.
      images: indices of the records into it, int64 (N,).
    """

    whole: Any
    images: np.ndarray

    @property
    def split(self) -> str:
        """Name of the whole."""
        return self.whole.split

    @property
    def directory(self) -> str:
        """Of the whole."""
        return self.whole.directory

    @property
    def digest(self) -> str:
        """Of the whole: with the number of images it says which these are."""
        return self.whole.digest

    @property
    def remedy(self) -> str:
        """What to do where records are damaged."""
        return self.whole.remedy

    def __len__(self) -> int:
        return len(self.images)

    def describe(self, index: int) -> str:
        """A record, for messages."""
        return self.whole.describe(int(self.images[index]))

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """The encoded image and the label of a record."""
        return self.whole[int(self.images[index])]


def parts(records: Any, validation: int | float) -> tuple[Any, Part | None]:
    """What of a split to train on, and what is held out, if anything; see `held_out`."""
    number = held_out(validation, len(records))
    if not number:
        return records, None
    kept, held = split_off(len(records), number)
    return Part(records, kept), Part(records, held)


def existing(split: T | None) -> T:
    """The split; `DatasetError` where there is none."""
    if split is None:
        raise DatasetError(
            "the data set has no validation split; take one from the training images by "
            "dataset.validation, such as 0.1"
        )
    return split
