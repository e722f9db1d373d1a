"""The order of training images: a function of the seed and the position in the stream alone."""

import functools
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from orthojax import checks
from orthojax.errors import DatasetError

_LARGEST_BATCH = 2**31 - 1


def epoch_permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order in which epoch `epoch` visits `size` images, a function of the arguments alone.

    NumPy promises the same bits for ever from `SeedSequence` and from a bit generator's
    `random_raw`, but not from `Generator.permutation` (NEP 19). So the order is that of `size`
    raw 64-bit words of Philox, sorted stably.

    Args:
      seed: a non-negative integer.
      epoch: a non-negative integer.
      size: the number of images, at least 1.

    Returns:
      int64 (size,), a permutation of `range(size)`.

    Raises:
      ConfigError: an argument is no such integer.

    Example:
      >>> epoch_permutation(seed=0, epoch=0, size=5).tolist()
      [1, 4, 2, 0, 3]
    """
    seed = checks.integer("seed", seed, 0)
    epoch = checks.integer("epoch", epoch, 0)
    size = checks.integer("size", size, 1)
    words = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(epoch,))).random_raw(size)
    return np.argsort(words, kind="stable")


# Two, because a batch may reach from one epoch into the next.
_recent_permutation = functools.lru_cache(maxsize=2)(epoch_permutation)


def images(seed: int, size: int, position: int, count: int) -> np.ndarray:
    """The images at `[position, position + count)` of the endless stream: int64 (count,).

    The stream is the concatenation over the epochs of `epoch_permutation(seed, epoch, size)`; a
    position counts images from its beginning.

    Raises:
      ConfigError: `size` or `count` is below 1, another argument below 0, or no integer.

    Example:
      >>> images(0, 5, 3, 4).tolist()  # the last two of the first epoch, and two of the second
      [0, 3, 2, 3]
    """
    seed = checks.integer("seed", seed, 0)
    size = checks.integer("size", size, 1)
    position = checks.integer("position", position, 0)
    count = checks.integer("count", count, 1)
    pieces = []
    while count:
        epoch, start = divmod(position, size)
        pieces.append(_recent_permutation(seed, epoch, size)[start : start + count])
        position += len(pieces[-1])
        count -= len(pieces[-1])
    return np.concatenate(pieces)


def image(seed: int, size: int, position: int) -> int:
    """The image at a position of the stream."""
    epoch, start = divmod(position, size)
    return int(_recent_permutation(seed, epoch, size)[start])


def random_words(seed: int, size: int, position: int, count: int) -> np.ndarray:
    """What is random about a position of the stream, such as a crop: uint64 (count,).

    Like the order it is the same for ever; images of an epoch draw independently, and so does an
    image in every epoch.
    """
    entropy = np.random.SeedSequence(seed, spawn_key=divmod(position, size))
    return np.random.Philox(entropy).random_raw(count)


class Resumable:
    """The state of a training iterator: a position in the endless stream of images.

    Args:
      seed: of the stream.
      size: the number of images.
      digest: of the images' names in their order, where they may be others than they were.
    """

    def __init__(self, seed: int, size: int, digest: str = ""):
        self._seed = seed
        self._size = size
        self._digest = digest
        self._position = 0

    def __iter__(self) -> Self:
        return self

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, of JSON's types; `position` counts the images handed out."""
        state = {"position": self._position, "seed": self._seed, "num_images": self._size}
        return {**state, "files": self._digest} if self._digest else state

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from what `get_state` returned.

        The batch size is not part of the state: with another one the stream of images goes on from
        the same image, cut into batches of the new size.

        Args:
          state: what `get_state` returned, perhaps from another process. `DatasetError` if it
            belongs to another seed or to a split of another length or of other files, which is
            another stream; `ConfigError` if it is no such state.
        """
        if not isinstance(state, Mapping) or not {"position", "seed", "num_images"} <= state.keys():
            raise checks.refuse("state", state, "what `get_state` returned")
        for name, own in (("seed", self._seed), ("num_images", self._size)):
            if state[name] != own:
                raise DatasetError(
                    f"the saved data position is of a stream with {name} {state[name]}, this one "
                    f"has {name} {own}; resume with the data set and seed the run was started with"
                )
        if state.get("files", self._digest) != self._digest:
            raise DatasetError(
                "the saved data position is of a split of other files: some were renamed, or as "
                "many added as removed; bring them back, or start another run"
            )
        self._position = checks.integer("position", state["position"], 0)


def check_batch(batch_size: int, rows: Any, size: int | None = None) -> np.ndarray:
    """Which rows of a batch to give.

    Args:
      batch_size: rows of the global batch.
      rows: None for all, or some in ascending order, integer (R,).
      size: images that there are, if a batch may not be larger.

    Raises:
      ConfigError: `batch_size` is no integer of at least 1, or `rows` are not rows of it.
      DatasetError: a batch is larger than the split.
    """
    batch_size = checks.integer("batch_size", batch_size, 1, _LARGEST_BATCH)
    if size is not None and batch_size > size:
        raise DatasetError(
            f"batch_size {batch_size} is larger than the training split of {size} "
            f"images; choose a batch_size of at most {size}"
        )
    if rows is None:
        return np.arange(batch_size)
    expected = f"rows of a batch of {batch_size}, in ascending order"
    given = np.asarray(rows)
    if given.ndim != 1 or given.dtype.kind not in "iu" or (np.diff(given) <= 0).any():
        raise checks.refuse("rows", rows, expected)
    if len(given) and not 0 <= given[0] <= given[-1] < batch_size:
        raise checks.refuse("rows", given.tolist(), expected)
    return given
