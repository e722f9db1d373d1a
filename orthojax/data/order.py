"""The order of training images: a function of the seed and the position in the stream alone."""

import functools
from typing import Any

import numpy as np

from orthojax.errors import DatasetError


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


# Two, because a batch may reach from one epoch into the next.
_recent_permutation = functools.lru_cache(maxsize=2)(epoch_permutation)


class Order:
    """Which image stands where in the endless stream of epochs, each in an order of its own.

    The stream is the concatenation over the epochs of `epoch_permutation(seed, epoch, size)`; a
    position counts images from its beginning.

    Args:
      seed: a non-negative integer; `ValueError` otherwise.
      size: the number of images.

    Example:
      >>> order = Order(seed=0, size=5)
      >>> order.images(3, 4).tolist()  # the last two of the first epoch, and two of the second
      [0, 3, 2, 3]
    """

    def __init__(self, seed: int, size: int):
        self.seed = seed
        self.size = size
        _recent_permutation(seed, 0, size)

    def images(self, position: int, count: int) -> np.ndarray:
        """The images at `[position, position + count)` of the stream: int64 (count,)."""
        pieces = []
        while count:
            epoch, start = divmod(position, self.size)
            permutation = _recent_permutation(self.seed, epoch, self.size)
            pieces.append(permutation[start : start + count])
            position += len(pieces[-1])
            count -= len(pieces[-1])
        return np.concatenate(pieces)

    def image(self, position: int) -> int:
        """The image at a position of the stream."""
        epoch, start = divmod(position, self.size)
        return int(_recent_permutation(self.seed, epoch, self.size)[start])

    def random_words(self, position: int, count: int) -> np.ndarray:
        """What is random about a position of the stream, such as a crop: uint64 (count,).

        Like the order it is the same for ever; images of an epoch draw independently, and so does
        an image in every epoch.
        """
        entropy = np.random.SeedSequence(self.seed, spawn_key=divmod(position, self.size))
        return np.random.Philox(entropy).random_raw(count)

    def state(self, position: int) -> dict[str, int]:
        """What a checkpoint keeps of the stream, of JSON's types."""
        return {"position": position, "seed": self.seed, "num_images": self.size}

    def position(self, state: dict[str, Any]) -> int:
        """The position in a state; `DatasetError` if it is of another seed or number of images."""
        for name, own in (("seed", self.seed), ("num_images", self.size)):
            if state[name] != own:
                raise DatasetError(
                    f"the saved data position is of a stream with {name} {state[name]}, this one "
                    f"has {name} {own}; resume with the data set and seed the run was started with"
                )
        return int(state["position"])


def check_batch_size(batch_size: int, size: int | None = None) -> None:
    """Raises `DatasetError` for a batch of no images, or of more than the `size` there are."""
    if batch_size < 1:
        raise DatasetError(f"batch_size {batch_size} is not positive; choose one of at least 1")
    if size is not None and batch_size > size:
        raise DatasetError(
            f"batch_size {batch_size} is larger than the training split of {size} "
            f"images; choose a batch_size of at most {size}"
        )
