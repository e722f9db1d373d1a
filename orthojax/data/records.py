"""The encoded images of a prepared TFDS split, read at random, without TFDS."""

import dataclasses
import functools
from typing import Any

from orthojax.data.example import parse_example
from orthojax.errors import DatasetError


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

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[memoryview, int]:
        """The encoded image and the label of a record; `DatasetError` if it cannot be read."""
        try:
            features = parse_example(self._files[index])
            encoded, label = features[self.image_key], features[self.label_key]
        except (RuntimeError, ValueError, KeyError) as error:
            raise DatasetError(
                f"record {index} of split {self.split!r} in {self.directory} is damaged or missing "
                f"({error}); remove that directory and prepare the set again"
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
    def _files(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(self.shards)
