"""The encoded images of a prepared TFDS split, read at random."""

import dataclasses
import functools
import warnings
from collections.abc import Iterable
from typing import Any

from orthojax.errors import DatasetError

# After so many images in a row that cannot be decoded it is the set that is broken.
PATIENCE = 100


@dataclasses.dataclass(frozen=True)
class Records:
    """Where the records of a split are. It travels to worker processes, which open the files.

    Attributes:
      split: its name, for messages.
      directory: of the prepared set, for messages.
      shards: `array_record` files, each with the range that belongs to the split:
        `/path/to/file[0:1251]`.
      size: number of records.
      image_key: the feature that holds an encoded image.
      label_key: the feature that holds its class.
      num_classes: labels are 0 to `num_classes - 1`.
    """

    split: str
    directory: str
    shards: tuple[str, ...]
    size: int
    image_key: str
    label_key: str
    num_classes: int

    @property
    def digest(self) -> str:
        """None is needed: a prepared set stays what it is."""
        return ""

    @property
    def remedy(self) -> str:
        """What to do where records are damaged."""
        return "remove that directory and prepare the set again"

    def __len__(self) -> int:
        return self.size

    def describe(self, index: int) -> str:
        """A record, for messages."""
        return f"image number {index} of split {self.split!r} in {self.directory}"

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """The encoded image and the label of a record; `DatasetError` if it cannot be read."""
        try:
            files, parse = self._opened
            features = parse(files[index]).features.feature
            image, label = features[self.image_key], features[self.label_key]
            encoded, label = image.bytes_list.value[0], label.int64_list.value[0]
        except Exception as error:  # the readers of the file and of the record raise what they like
            raise DatasetError(
                f"record {index} of split {self.split!r} in {self.directory} is damaged or missing "
                f"({error}); {self.remedy}"
            ) from error
        if not 0 <= label < self.num_classes:
            raise DatasetError(
                f"record {index} of split {self.split!r} in {self.directory} has the label "
                f"{label}, and there are {self.num_classes} classes; choose a split with labels"
            )
        return encoded, label

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def _opened(self) -> tuple[Any, Any]:
        from array_record.python.array_record_data_source import ArrayRecordDataSource
        from tensorflow_datasets.proto import tf_example_pb2

        return ArrayRecordDataSource(self.shards), tf_example_pb2.Example.FromString


def check_images(records: Records) -> None:
    """Finds out, before anything is trained, whether a split can be decoded at all.

    Raises:
      DatasetError: not one of the first images can be.
    """
    from orthojax.data import jpeg  # here, because importing OpenCV takes a while

    count = min(PATIENCE, len(records))
    for index in range(count):
        try:
            jpeg.decode(records[index][0])
            return
        except jpeg.UndecodableError as error:
            reason = error
    raise all_broken(records, 0, count, reason)


def all_broken(
    records: Records, first: int, count: int, reason: Exception | None = None
) -> DatasetError:
    """What to raise where `count` images in a row, from the `first` on, cannot be decoded."""
    why = f" ({reason})" if reason else ""
    return DatasetError(
        f"not one of {count} images in a row can be decoded, from {records.describe(first)} "
        f"on{why}; {records.remedy}"
    )


class Undecodable:
    """Counts the images of a split that cannot be decoded, and warns of them.

    Args:
      records: of the split.
      remedy: what is done with such an image: `left out`.
    """

    def __init__(self, records: Records, remedy: str):
        self._records = records
        self._where = f"split {records.split!r} in {records.directory}"
        self._remedy = remedy
        self._count = 0
        self._warned = False

    def add(self, images: Iterable[int]) -> None:
        """Counts the indices that are not -1, and warns of the first at once."""
        found = [image for image in images if image >= 0]
        self._count += len(found)
        if found and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._records.describe(found[0])} cannot be decoded and is {self._remedy}; if "
                "there are more, their count follows",
                stacklevel=3,
            )

    def report(self, when: str) -> None:
        """Warns of how many there were since the last report, if more than one."""
        if self._count > 1:
            warnings.warn(
                f"{when} {self._count:,} images of {self._where} could not be decoded and were "
                f"{self._remedy}",
                stacklevel=3,
            )
        self._count = 0
