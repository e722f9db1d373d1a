"""From any picture to what a net was trained on; kept beside a run, so no data set is needed."""

import dataclasses
import io
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
        except OSError as error:
            raise DatasetError(f"{path}: {error.strerror or error}") from error
        try:
            return self._photograph(encoded) if self.resize else self._picture(encoded)
        except (OSError, ValueError, SyntaxError) as error:
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

        Raises:
          DatasetError: a key is missing, or holds what no preprocessing has; the message names it.

        Example:
          >>> given = Preprocessing((1, 1, 1), ("a", "b"), np.zeros((1, 1, 1)), np.ones((1, 1, 1)))
          >>> Preprocessing.from_json(given.to_json()).class_names
          ('a', 'b')
        """
        keys = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or not set(keys) <= set(values):
            raise DatasetError(f"it must be a section with the keys {', '.join(keys)}")
        shape, names, resize = values["image_shape"], values["class_names"], values["resize"]
        if not (isinstance(shape, list) and len(shape) == 3 and all(map(_is_size, shape))):
            raise DatasetError(f"`image_shape` is {shape!r}; it must be three sizes above 0")
        if not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
            raise DatasetError(f"`class_names` is {names!r}; it must be a list of names")
        if not (resize == 0 or _is_size(resize) and resize >= max(shape[:2])):
            raise DatasetError(f"`resize` is {resize!r}; it must be 0, or no less than {shape[0]}")
        mean, std = (_statistics(name, values[name], shape) for name in ("mean", "std"))
        if (mean is None) != (std is None) or (std is not None and not (std > 0).all()):
            raise DatasetError("`std` must be above 0 everywhere, and null where `mean` is")
        return cls(tuple(shape), tuple(names), mean, std, resize=resize)

    def _picture(self, encoded: bytes) -> np.ndarray:
        height, width, channels = self.image_shape
        with PIL.Image.open(io.BytesIO(encoded)) as image:
            converted = image.convert("L" if channels == 1 else "RGB")
        scaled = converted.resize((width, height), PIL.Image.Resampling.BOX)
        return np.asarray(scaled).reshape(self.image_shape)

    def _photograph(self, encoded: bytes) -> np.ndarray:
        try:
            from orthojax.data import jpeg
        except ImportError as error:
            raise DatasetError(
                f"reading photographs needs {error.name}: pip install -e '.[imagenet]'"
            ) from error
        out = np.empty(self.image_shape, np.uint8)
        margin = (self.resize - self.image_shape[0]) // 2
        jpeg.crop_into(out, encoded, self.resize, margin, margin)
        return out


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _statistics(name: str, value: Any, shape: list[int]) -> np.ndarray | None:
    if value is None:
        return None
    try:
        array = np.asarray(value, np.float32)
    except (ValueError, TypeError):
        array = np.zeros(0)
    if list(array.shape) != shape or not np.isfinite(array).all():
        raise DatasetError(f"`{name}` must be finite numbers of the shape {shape}, or null")
    return array


def named(class_names: tuple[str, ...], num_classes: int) -> tuple[str, ...]:
    """The names of classes, or where a data set has none their numbers.

    Example:
      >>> named((), 3)
      ('0', '1', '2')
    """
    return tuple(class_names) or tuple(map(str, range(num_classes)))
