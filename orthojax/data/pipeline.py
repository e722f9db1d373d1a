"""Batches in host memory: an infinite shuffled stream to train on, one exact pass to evaluate."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from orthojax.data.dataset import Split
from orthojax.errors import DatasetError

Batch = dict[str, np.ndarray]


def epoch_permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order in which epoch `epoch` visits `size` images, a function of the arguments alone.

    NumPy promises the same bits for ever from `SeedSequence` and from a bit generator's
    `random_raw`, but not from `Generator.permutation` (NEP 19). So the order is that of `size`
    raw 64-bit words of Philox, sorted stably.

    Args:
      seed: a non-negative integer; `ValueError` otherwise.
      epoch: a non-negative integer.
      size: the number of images.

    Returns:
      int64 (size,), a permutation of `range(size)`.

    Example:
      >>> epoch_permutation(seed=0, epoch=0, size=5).tolist()
      [1, 4, 2, 0, 3]
    """
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(size)
    return np.argsort(words, kind="stable")


class TrainIterator:
    """Yields training batches for ever; batch k is a function of (seed, k) alone.

    The stream is the concatenation over the epochs of `epoch_permutation(seed, epoch, len(split))`,
    and batch k holds its positions `[k * batch_size, (k + 1) * batch_size)`: a batch may cross from
    one epoch into the next, and no image is ever dropped. `set_state` followed by `next` gives,
    bit for bit, what the undisturbed stream would have given.

    Each batch is a new array rather than a buffer used again: `jax.device_put` may keep reading
    from, or even alias, the memory it was given. Gathering needs no thread of its own: it is far
    faster than any model here (`tests/test_data_speed.py` measures it).

    Args:
      split: what to draw from.
      batch_size: B, at least 1 and at most `len(split)`; `DatasetError` otherwise.
      seed: a non-negative integer; `ValueError` otherwise.
      rows: which rows of every batch to gather, for a host that supplies a part of them; None is
        all. Neither the order nor the state depends on it.

    Each item is `{"image": uint8 (B, H, W, C), "label": int32 (B,)}`.

    Example:
      >>> images = np.zeros((10, 8, 8, 1), np.uint8)
      >>> split = Split(images=images, labels=np.arange(10, dtype=np.int32))
      >>> batches = TrainIterator(split, batch_size=4, seed=0)
      >>> next(batches)["label"].shape
      (4,)
      >>> batches.get_state()
      {'position': 4, 'seed': 0, 'num_images': 10}
    """

    def __init__(self, split: Split, batch_size: int, seed: int, rows: np.ndarray | None = None):
        _check_batch_size(batch_size)
        if batch_size > len(split):
            raise DatasetError(
                f"batch_size {batch_size} is larger than the training split of {len(split)} "
                f"images; choose a batch_size of at most {len(split)}"
            )
        self._split = split
        self._batch_size = batch_size
        self._seed = seed
        self._wanted = slice(None) if rows is None else rows
        self._position = 0
        self._epoch = 0
        self._permutation = epoch_permutation(seed, 0, len(split))

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        rows = self._rows(self._position)[self._wanted]
        self._position += self._batch_size
        return {
            "image": np.take(self._split.images, rows, axis=0),
            "label": np.take(self._split.labels, rows),
        }

    def get_state(self) -> dict[str, int]:
        """Where the stream stands, JSON-able; `position` counts the images handed out so far."""
        return {
            "position": self._position,
            "seed": self._seed,
            "num_images": len(self._split),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned.

        The batch size is not part of the state: with another one the stream of images goes on from
        the same image, cut into batches of the new size.

        Args:
          state: what `get_state` returned, perhaps from another process. `DatasetError` if it
            belongs to another seed or to a split of another length, which is another stream.
        """
        for name, own in (("seed", self._seed), ("num_images", len(self._split))):
            if state[name] != own:
                raise DatasetError(
                    f"the saved data position is of a stream with {name} {state[name]}, this one "
                    f"has {name} {own}; resume with the data set and seed the run was started with"
                )
        self._position = int(state["position"])

    def _rows(self, position: int) -> np.ndarray:
        """The rows of the split at `[position, position + batch_size)` of the stream."""
        pieces = []
        missing = self._batch_size
        while missing:
            epoch, start = divmod(position, len(self._split))
            if epoch != self._epoch:
                self._permutation = epoch_permutation(self._seed, epoch, len(self._split))
                self._epoch = epoch
            pieces.append(self._permutation[start : start + missing])
            position += len(pieces[-1])
            missing -= len(pieces[-1])
        return np.concatenate(pieces)


def eval_batches(split: Split, batch_size: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
    """One pass over a split in its own order, every image exactly once, in batches of one size.

    Args:
      split: what to read.
      batch_size: B, at least 1; `DatasetError` otherwise. It may exceed `len(split)`.
      rows: which rows of every batch to give, as for `TrainIterator`.

    Returns:
      An iterator of `{"image": uint8 (B, H, W, C), "label": int32 (B,), "mask": float32 (B,)}`.
      The last batch is filled up with black images of label 0, whose mask is 0; it is 1 elsewhere.

    Example:
      >>> images = np.zeros((10, 8, 8, 1), np.uint8)
      >>> split = Split(images=images, labels=np.arange(10, dtype=np.int32))
      >>> [batch["mask"].sum().item() for batch in eval_batches(split, batch_size=4)]
      [4.0, 4.0, 2.0]
    """
    _check_batch_size(batch_size)
    return _padded_batches(split, batch_size, np.arange(batch_size) if rows is None else rows)


def _padded_batches(split: Split, batch_size: int, rows: np.ndarray) -> Iterator[Batch]:
    for start in range(0, len(split), batch_size):
        there = rows[start + rows < len(split)] + start  # rows ascend, so the padding comes last
        padding = len(rows) - len(there)
        yield {
            "image": np.pad(split.images[there], ((0, padding), (0, 0), (0, 0), (0, 0))),
            "label": np.pad(split.labels[there], (0, padding)),
            "mask": np.pad(np.ones(len(there), np.float32), (0, padding)),
        }


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise DatasetError(f"batch_size {batch_size} is not positive; choose one of at least 1")
