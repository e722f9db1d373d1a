"""A trained net that is asked about images."""

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from orthojax.errors import DatasetError
from orthojax.inference.folding import FoldedNet, fold_batch_norm
from orthojax.models import ConvNet
from orthojax.training.restore import Trained
from orthojax.training.step import batch_statistics

Images = np.ndarray | str | os.PathLike | Iterable[str | os.PathLike]

LARGEST_BATCH = 256  # what is more is cut into pieces, which bounds the memory


class Classifier(Trained):
    """A trained net that answers; its `net` may be a `FoldedNet`."""

    def predict(self, images: Images) -> np.ndarray:
        """Probabilities of the classes.

        A program is compiled for each power of two that a batch is padded to, up to 256.

        Args:
          images: uint8 (N, H, W, C), or (H, W, C) for one, of the shape that the net was trained
            on; or the path of a picture of any size, or an iterable of paths, which are read as
            they are needed.

        Returns:
          float32 (N, classes); each row sums to 1.

        Raises:
          DatasetError: the images are of another shape or dtype, or a file cannot be read.
        """
        return np.asarray(jax.nn.softmax(self.logits(images)))

    def logits(self, images: Images) -> np.ndarray:
        """The same before the softmax: float32 (N, classes)."""
        found = [np.zeros((0, len(self.class_names)), np.float32)]
        for piece in self._pieces(images):
            padded = np.zeros((_power_of_two(len(piece)), *piece.shape[1:]), np.uint8)
            padded[: len(piece)] = piece
            found.append(np.asarray(self._apply(self.variables, padded))[: len(piece)])
        return np.concatenate(found)

    def recalibrated(self, images: Images) -> "Classifier":
        """The same net with the batch-normalization statistics of these images, in one pass.

        For nets whose running statistics are of no use, see `recalibrate_bn` in a config.

        Args:
          images: see `predict`; training images, some hundred or thousand.
        """
        if isinstance(self.net, FoldedNet):
            raise ValueError("a folded net has no statistics; recalibrate first, and then fold")
        _check_ours(self.net, "recalibrated")
        statistics = jax.jit(functools.partial(batch_statistics, self.net))
        pieces = list(self._pieces(images))
        if not pieces:
            raise DatasetError("there is no image whose statistics could be taken; give some")
        inputs = self.preprocessing.normalize(np.concatenate(pieces))
        found = statistics(self.variables, inputs)
        return dataclasses.replace(self, variables={**self.variables, "batch_stats": found})

    def folded(self) -> "Classifier":
        """The same net with batch normalization folded into the convolutions.

        The same up to rounding, for inference alone; see `orthojax.inference.folding`.
        """
        _check_ours(self.net, "folded")
        return dataclasses.replace(
            self, net=FoldedNet(self.net), variables=fold_batch_norm(self.variables)
        )

    @functools.cached_property
    def _apply(self):
        def apply(variables, images):
            inputs = self.preprocessing.normalize(images)
            return self.net.apply(variables, inputs, train=False).astype(jnp.float32)

        return jax.jit(apply)

    def _pieces(self, images: Images) -> Iterator[np.ndarray]:
        """Pixels, uint8 (N, H, W, C), of at most `LARGEST_BATCH` images at a time."""
        if isinstance(images, str | os.PathLike):
            images = [images]
        if isinstance(images, np.ndarray | jax.Array):
            pixels = self._checked(np.asarray(images))
            for start in range(0, len(pixels), LARGEST_BATCH):
                yield pixels[start : start + LARGEST_BATCH]
            return
        if not isinstance(images, Iterable) or isinstance(images, AbstractSet | bytes):
            raise DatasetError(
                f"images are {type(images).__name__} {_shown(images)}, and must be one uint8 "
                "array, or paths of pictures in an order"
            )
        read = map(self._picture, images)
        while piece := list(itertools.islice(read, LARGEST_BATCH)):
            yield np.stack(piece)

    def _picture(self, path: str | os.PathLike) -> np.ndarray:
        if not isinstance(path, str | os.PathLike):
            raise DatasetError(
                f"images are neither one uint8 array nor paths of pictures: among them is "
                f"{type(path).__name__} {_shown(path)}"
            )
        return self.preprocessing.read(path)

    def _checked(self, pixels: np.ndarray) -> np.ndarray:
        if pixels.ndim == len(self._shape):
            pixels = pixels[None]
        if pixels.dtype != np.uint8 or pixels.shape[1:] != self._shape:
            wanted = ", ".join(map(str, self._shape))
            raise DatasetError(
                f"images are {pixels.dtype} {pixels.shape}, and must be uint8 (N, {wanted}); the "
                "path of a picture is taken too, of any size"
            )
        return pixels

    @property
    def _shape(self) -> tuple[int, int, int]:
        return self.preprocessing.image_shape


def _check_ours(net: Any, what: str) -> None:
    if not isinstance(net, ConvNet):
        raise ValueError(
            f"only the nets of orthojax.models can be {what}, not {type(net).__name__}"
        )


def _shown(value: Any) -> str:
    return f"{value.dtype} {value.shape}" if hasattr(value, "shape") else repr(value)[:60]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
