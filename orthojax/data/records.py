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
    """

    split: str
    directory: str
    shards: tuple[str, ...]
    size: int
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> tuple[memoryview, int]:
        """The encoded image and the label of a record; `DatasetError` if it cannot be read."""
        try:
            features = parse_example(self._files[index])
            return features[self.image_key], features[self.label_key]
        except (RuntimeError, ValueError, KeyError) as error:
            raise DatasetError(
                f"record {index} of split {self.split!r} in {self.directory} is damaged or missing "
                f"({error}); remove that directory and prepare the set again"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @functools.cached_property
    def _files(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(self.shards)
