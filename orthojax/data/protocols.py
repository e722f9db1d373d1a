"""What training asks of a data set, whether its images are in memory or come from a disk."""

from collections.abc import Iterator, Sized
from typing import Any, Protocol

import jax
import numpy as np

from orthojax.data.preprocessing import Preprocessing

Batch = dict[str, np.ndarray]


class TrainBatches(Protocol):
    """An endless iterator of training batches that can be stopped and continued exactly.

    Each item is `{"image": uint8 (R, H, W, C), "label": int32 (R,)}`, of the R rows that this host
    supplies.
    """

    def __iter__(self) -> "TrainBatches": ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, of JSON's types; it counts images, not batches.

        So it holds for another batch size, and for another number of hosts or worker processes.
        """
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned; `DatasetError` if that is of another stream."""
        ...

    def close(self) -> None:
        """Ends worker processes, where there are any."""
        ...


class Splits:
    """The sizes of a data set: of `train`, `test`, and `validation`, which may be None."""

    train: Sized
    test: Sized
    validation: Sized | None

    @property
    def train_size(self) -> int:
        """Images of the training split."""
        return len(self.train)

    @property
    def validation_size(self) -> int:
        """Images of the validation split; 0 without one."""
        return 0 if self.validation is None else len(self.validation)

    @property
    def test_size(self) -> int:
        """Images of the test split."""
        return len(self.test)


class Dataset(Protocol):
    """An image-classification set with a training and a test split, and perhaps a third.

    Attributes:
      name: what it was loaded as.
      num_classes: labels are 0 to `num_classes - 1`.
      image_shape: (H, W, C) of what the net sees.
      train_size: images of the training split, without those of the validation split.
      validation_size: images of the validation split; 0 without one.
      test_size: images of the test split.
      preprocessing: what evaluation does to an image, without the data set.
    """

    @property
    def name(self) -> str: ...

    @property
    def num_classes(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def train_size(self) -> int: ...

    @property
    def validation_size(self) -> int: ...

    @property
    def test_size(self) -> int: ...

    @property
    def preprocessing(self) -> Preprocessing: ...

    def train_batches(
        self, batch_size: int, seed: int, rows: np.ndarray | None = None
    ) -> TrainBatches:
        """The stream of training batches from its beginning.

        Args:
          batch_size: rows of the global batch, at most `train_size`; `DatasetError` otherwise.
          seed: of the order, and of what is random on the host; which image with which crop stands
            at a position of the stream is a function of the seed and the position alone.
          rows: which rows of every global batch to give, in ascending order; None is all.
        """
        ...

    def validation_batches(
        self, batch_size: int, rows: np.ndarray | None = None
    ) -> Iterator[Batch]:
        """One pass over the validation split, as `test_batches`; `DatasetError` without one."""
        ...

    def test_batches(self, batch_size: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
        """One pass over the test split, every image exactly once.

        Args:
          batch_size: rows of the global batch; it may exceed `test_size`.
          rows: see `train_batches`.

        Returns:
          An iterator of `{"image": uint8 (R, H, W, C), "label": int32 (R,), "mask": float32 (R,)}`;
          the mask is 0 where the last batch is filled up.
        """
        ...

    def augment(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """What training sees of a batch, as part of the jitted step.

        Args:
          images: uint8 (B, H, W, C).
          key: a JAX random key.

        Returns:
          float32 (B, H, W, C).
        """
        ...

    def normalize(self, images: jax.Array) -> jax.Array:
        """What evaluation sees of a batch: `augment` without what is random."""
        ...
