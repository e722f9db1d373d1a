"""From any picture to what a net was trained on; kept beside a run, so no data set is needed."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import PIL.Image

from orthojax import checks
from orthojax.data import augmentation
from orthojax.errors import ConfigError, DatasetError
from orthojax.extras import require

FILE = "preprocessing.json"  # in a working directory

LARGEST_SHOWN = 10  # class names in a message
CHECKSUM = "checksum"  # key of the SHA-256 of all but the names, which may be changed


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

    Raises:
      ConfigError: an attribute is of another kind, a name stands for two classes, or the shapes do
        not belong together.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    resize: int = 0

    def __post_init__(self):
        shape, names = self.image_shape, self.class_names
        sizes = checks.integers("image_shape", shape, 1, "sizes (H, W, C)", lengths=(3,))
        several = isinstance(names, Sequence) and not isinstance(names, str)
        if not (several and names and all(isinstance(name, str) for name in names)):
            raise checks.refuse("class_names", names, "one name for each class")
        if len(set(names)) < len(names):
            raise checks.refuse("class_names", names, "another name for each class")
        resize = checks.integer("resize", self.resize, 0)
        if resize and resize < max(sizes[:2]):
            raise checks.refuse("resize", resize, f"0, or at least the sides of {sizes}")
        statistics = self.mean, self.std
        if any(array is None for array in statistics) and self.mean is not self.std:
            raise checks.refuse("mean", self.mean, "None where `std` is, and only there")
        if self.mean is not None:
            augmentation.check_statistics(sizes, mean=self.mean, std=self.std)
            for name in ("mean", "std"):
                if np.shape(getattr(self, name)) != sizes:
                    raise checks.refuse(name, getattr(self, name), f"of the shape {sizes}")

    def normalize(self, images: jax.Array) -> jax.Array:
        """What evaluation sees.

        Args:
          images: uint8 (N, H, W, C).

        Returns:
          float32 (N, H, W, C).

        Raises:
          ConfigError: they are of another dtype or shape.
        """
        if getattr(images, "dtype", None) != np.uint8 or images.shape[1:] != self.image_shape:
            raise checks.refuse("images", images, f"uint8 (N, *{self.image_shape})")
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
          ConfigError: `path` is none.
        """
        if not isinstance(path, str | os.PathLike):
            raise checks.refuse("path", path, "the path of a picture")
        try:
            encoded = pathlib.Path(path).read_bytes()
        except (OSError, ValueError) as error:  # the second is of a name that holds a zero
            raise DatasetError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
        from orthojax.data import jpeg  # here, because importing OpenCV takes a while

        try:
            return self._photograph(encoded) if self.resize else self._picture(encoded)
        except jpeg.UndecodableError as error:
            raise DatasetError(f"{path} is no picture that can be read: {error}") from error

    def labels_of(self, class_names: Sequence[str]) -> np.ndarray:
        """For each class of a data set the label that the net has for it: by name, not by number.

        Args:
          class_names: of the data set, which may lack some of the net's.

        Returns:
          int64 (len(class_names),).

        Raises:
          DatasetError: a class is none of the net's.
          ConfigError: `class_names` is one string.

        Example:
          >>> Preprocessing((1, 1, 1), ("cat", "dog", "emu")).labels_of(("emu", "cat"))
          array([2, 0])
        """
        if isinstance(class_names, str):
            raise checks.refuse("class_names", class_names, "a sequence of names")
        known = {name: label for label, name in enumerate(self.class_names)}
        unknown = [name for name in class_names if name not in known]
        if unknown:
            raise DatasetError(
                f"the data set has the class {unknown[0]!r}, which the net does not have: it knows "
                f"{_shown(self.class_names)}, and the data set {_shown(class_names)}; give the "
                "classes the names that the net was trained with"
            )
        return np.array([known[name] for name in class_names], np.int64)

    def differences(self, other: "Preprocessing") -> list[str]:
        """In what another data set differs from the one that this belongs to, a line for each.

        Statistics of pixels may differ by half a gray level.
        """
        lines = [
            f"{name}: {_shown(ours)} -> {_shown(theirs)}"
            for name in ("class_names", "image_shape", "resize")
            if (ours := getattr(self, name)) != (theirs := getattr(other, name))
        ]
        for name in ("mean", "std"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if (ours is None) != (theirs is None):
                lines.append(f"{name}: of the pixels -> of ImageNet's colors, or the reverse")
            elif ours is not None and ours.shape == theirs.shape:
                apart = float(np.abs(ours - theirs).max() * 255)
                if not apart <= 0.5:
                    lines.append(f"{name}: up to {apart:.3g} gray levels apart")
        return lines

    def to_json(self) -> dict[str, Any]:
        """As values of JSON's types, exact to the last bit, and a checksum of all but the names."""
        values = dataclasses.asdict(self)
        for name in ("mean", "std"):
            if values[name] is not None:
                values[name] = np.asarray(values[name], np.float64).tolist()
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        return values | {CHECKSUM: _checksum(values)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Preprocessing":
        """The inverse of `to_json`.

        Raises:
          DatasetError: a key is missing, or holds what no preprocessing has; the message names it.
            Or a number is another than `to_json` wrote. (Without a checksum it is not known.)

        Example:
          >>> given = Preprocessing((1, 1, 1), ("a", "b"), np.zeros((1, 1, 1)), np.ones((1, 1, 1)))
          >>> Preprocessing.from_json(given.to_json()).class_names
          ('a', 'b')
        """
        keys = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or not set(keys) <= set(values):
            raise DatasetError(f"it must be a section with the keys {', '.join(keys)}")
        try:
            found = cls(**{key: _of_json(values[key]) for key in keys})
        except ConfigError as error:
            raise DatasetError(str(error)) from error
        if values.get(CHECKSUM) not in (None, _checksum(values)):
            raise DatasetError("it is damaged: its numbers are not those that were written")
        return found

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
            require("imagenet", "reading photographs")
        out = np.empty(self.image_shape, np.uint8)
        margin = (self.resize - self.image_shape[0]) // 2
        jpeg.crop_into(out, encoded, self.resize, margin, margin)
        return out


def _checksum(values: Mapping[str, Any]) -> str:
    covered = {k: v for k, v in values.items() if k not in (CHECKSUM, "class_names")}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _of_json(value: Any) -> Any:
    """Lists of numbers as float32 arrays, others as tuples."""
    if not isinstance(value, list):
        return value
    try:
        array = np.asarray(value)
    except ValueError:  # of different lengths
        return tuple(value)
    numbers = array.ndim == 3 and array.dtype.kind in "fiu"
    return array.astype(np.float32) if numbers else tuple(value)


def _shown(value: Any) -> str:
    if isinstance(value, Sequence) and len(value) > LARGEST_SHOWN:
        return f"{', '.join(map(repr, value[:LARGEST_SHOWN]))}, … ({len(value)} in all)"
    return ", ".join(map(repr, value)) if isinstance(value, Sequence) else repr(value)


def named(class_names: tuple[str, ...], num_classes: int) -> tuple[str, ...]:
    """The names of classes, or where a data set has none their numbers.

    Example:
      >>> named((), 3)
      ('0', '1', '2')
    """
    return tuple(class_names) or tuple(map(str, range(num_classes)))
