"""From any picture to what a net was trained on; kept beside a run, so no data set is needed."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import PIL.Image

from orthojax.data import augmentation
from orthojax.errors import DatasetError

FILE = "preprocessing.json"  # in a working directory


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images become the input of a net.

    Attributes:
      image_shape: (H, W, C) of what the net sees.
      class_names: one for each label; the numbers themselves where a data set names none.
      mean: float32 (H, W, C), of pixels on the scale 0 to 1; None is ImageNet's mean color.
      std: likewise.
      resize: photographs are scaled to a square of this side, and the center is cut from it; 0
        scales a picture to `image_shape` at once.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    resize: int = 0

    def normalize(self, images: jax.Array) -> jax.Array:
        """What evaluation sees.

        Args:
          images: uint8 (N, H, W, C).

        Returns:
          float32 (N, H, W, C).
        """
        if self.mean is None:
            return augmentation.standardize_rgb(images)
        return augmentation.normalize(images, mean=self.mean, std=self.std)

    def read(self, path: str | os.PathLike) -> np.ndarray:
        """Reads a picture of any size and mode, as the net wants it.

        A picture of several times the net's size is averaged down, without regard to its aspect
        ratio.

        Args:
          path: of a JPEG, a PNG, or what else Pillow reads.

        Returns:
          uint8 (H, W, C).

        Raises:
          DatasetError: there is no such file, or it is no picture.
        """
        try:
            encoded = pathlib.Path(path).read_bytes()
        except (OSError, ValueError) as error:  # the second is of a name that holds a zero
            raise DatasetError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        from orthojax.data import jpeg  # here, because importing OpenCV takes a while

        try:
            return self._photograph(encoded) if self.resize else self._picture(encoded)
        except jpeg.UndecodableError as error:
            raise DatasetError(f"{path} is no picture that can be read: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """As values of JSON's types, exact to the last bit."""
        values = dataclasses.asdict(self)
        for name in ("mean", "std"):
            if values[name] is not None:
                values[name] = np.asarray(values[name], np.float64).tolist()
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_json`.

        Example:
          >>> given = Preprocessing((1, 1, 1), ("a", "b"), np.zeros((1, 1, 1)), np.ones((1, 1, 1)))
          >>> Preprocessing.from_json(given.to_json()).class_names
          ('a', 'b')
        """
        arrays = {
            name: None if values[name] is None else np.asarray(values[name], np.float32)
            for name in ("mean", "std")
        }
        shape, names = tuple(values["image_shape"]), tuple(values["class_names"])
        return cls(shape, names, **arrays, resize=values["resize"])

    def _picture(self, encoded: bytes) -> np.ndarray:
        from orthojax.data import jpeg

        height, width, channels = self.image_shape
        pixels = jpeg.decode(encoded, channels=channels)
        image = PIL.Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        scaled = image.resize((width, height), PIL.Image.Resampling.BOX)
        return np.asarray(scaled).reshape(self.image_shape)

    def _photograph(self, encoded: bytes) -> np.ndarray:
        from orthojax.data import jpeg

        if jpeg.cv2 is None:
            raise DatasetError("reading photographs needs OpenCV: pip install -e '.[imagenet]'")
        out = np.empty(self.image_shape, np.uint8)
        margin = (self.resize - self.image_shape[0]) // 2
        jpeg.crop_into(out, encoded, self.resize, margin, margin)
        return out


def named(class_names: tuple[str, ...], num_classes: int) -> tuple[str, ...]:
    """The names of classes, or where a data set has none their numbers.

    Example:
      >>> named((), 3)
      ('0', '1', '2')
    """
    return tuple(class_names) or tuple(map(str, range(num_classes)))
