"""Batches in host memory: an infinite shuffled stream to train on, one exact pass to evaluate."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from orthojax import checks
from orthojax.data import sampler
from orthojax.data.augmentation import check_images

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Split:
    """Images and labels in memory, in the order of the records.

    Shapes: `images` uint8 (N, H, W, C), `labels` int32 (N,).

    Raises:
      ConfigError: they are of another rank, dtype or length.
    """

    images: np.ndarray
    labels: np.ndarray

    def __post_init__(self):
        check_images("images", self.images)
        labels = self.labels
        kind = getattr(getattr(labels, "dtype", None), "kind", "")
        if kind not in ("i", "u") or np.shape(labels) != (len(self.images),):
            expected = f"a label for each of {len(self.images)} images, an integer array (N,)"
            raise checks.refuse("labels", labels, expected)

    def __len__(self) -> int:
        return len(self.labels)


class TrainIterator(sampler.Resumable):
    """Yields training batches for ever; batch k is a function of (seed, k) alone.

    Batch k holds the positions `[k * batch_size, (k + 1) * batch_size)` of the stream
    (`orthojax.data.sampler.images`): a batch may cross from one epoch into the next, and no image
    is ever dropped. `set_state` followed by `next` gives, bit for bit, what the undisturbed stream
    would have given.

    Each batch is a new array rather than a buffer used again: `jax.device_put` may keep reading
    from, or even alias, the memory it was given. Gathering needs no thread of its own: it is far
    faster than any model here (`python launch/benchmark.py input` measures it).

    Args:
      split: what to draw from.
      batch_size: B, at least 1 and at most `len(split)`.
      seed: a non-negative integer.
      rows: which rows of every batch to gather, for a host that supplies a part of them; None is
        all. Neither the order nor the state depends on it.

    Raises:
      ConfigError: an argument is of another kind or out of range.
      DatasetError: the split is smaller than a batch.

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
        _check_split(split)
        self._wanted = sampler.check_batch(batch_size, rows, len(split))
        super().__init__(seed, len(split))
        self._split = split
        self._batch_size = int(batch_size)
        sampler.images(seed, len(split), 0, 1)  # a negative seed is an error here

    def __next__(self) -> Batch:
        images = sampler.images(self._seed, self._size, self._position, self._batch_size)
        images = images[self._wanted]
        self._position += self._batch_size
        return {
            "image": np.take(self._split.images, images, axis=0),
            "label": np.take(self._split.labels, images),
        }

    def close(self) -> None:
        """Frees what the iterator holds: here nothing."""


def eval_batches(split: Split, batch_size: int, rows: np.ndarray | None = None) -> Iterator[Batch]:
    """One pass over a split in its own order, every image exactly once, in batches of one size.

    Args:
      split: what to read.
      batch_size: B, at least 1. It may exceed `len(split)`.
      rows: which rows of every batch to give, as for `TrainIterator`.

    Returns:
      An iterator of `{"image": uint8 (B, H, W, C), "label": int32 (B,), "mask": float32 (B,)}`.
      The last batch is filled up with black images of label 0, whose mask is 0; it is 1 elsewhere.

    Raises:
      ConfigError: an argument is of another kind or out of range.

    Example:
      >>> images = np.zeros((10, 8, 8, 1), np.uint8)
      >>> split = Split(images=images, labels=np.arange(10, dtype=np.int32))
      >>> [batch["mask"].sum().item() for batch in eval_batches(split, batch_size=4)]
      [4.0, 4.0, 2.0]
    """
    _check_split(split)
    return _padded_batches(split, batch_size, sampler.check_batch(batch_size, rows))


def _check_split(split: object) -> None:
    if not isinstance(split, Split):
        raise checks.refuse("split", split, "a `Split`")


def _padded_batches(split: Split, batch_size: int, rows: np.ndarray) -> Iterator[Batch]:
    for start in range(0, len(split), batch_size):
        there = rows[start + rows < len(split)] + start  # rows ascend, so the padding comes last
        padding = len(rows) - len(there)
        yield {
            "image": np.pad(split.images[there], ((0, padding), (0, 0), (0, 0), (0, 0))),
            "label": np.pad(split.labels[there], (0, padding)),
            "mask": np.pad(np.ones(len(there), np.float32), (0, padding)),
        }
