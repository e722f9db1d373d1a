"""Pictures: from encoded bytes to pixels, to a square, to a crop. What a worker process spends its
time with; JAX is not involved.

`decode` is the one reader, of training, evaluation and prediction. JPEGs are decoded by
libjpeg-turbo, through simplejpeg; what that refuses (CMYK, other formats, corrupt data) Pillow is
tried on, and everything where simplejpeg is not installed. OpenCV resizes.
"""

import functools
import io
import math

import numpy as np
import PIL.Image

from orthojax import checks

try:  # of the extra `imagenet`; nets of small images need neither
    import cv2
    import simplejpeg
except ImportError:
    cv2 = simplejpeg = None

# A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, by a smaller inverse DCT, as long as both
# sides stay this many times as long as asked for: so near that, the result of resizing differs by
# less than from one resampling filter to another.
REDUCTION_MARGIN = 2


_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's, by the number of channels


class UndecodableError(ValueError):
    """Bytes that no decoder makes a whole image of: cut short, too large, or no image at all."""


def decode(
    encoded: bytes | memoryview, at_least: int | None = None, channels: int = 3
) -> np.ndarray:
    """Decodes an image of any kind, as it lies: an orientation in its metadata is ignored.

    Args:
      encoded: the content of a file: JPEG (also gray or CMYK), PNG, or what else Pillow reads. Of
        16-bit images the upper eight bits are taken.
      at_least: if given, a large JPEG may come back reduced by 2, 4 or 8, with both sides at least
        `REDUCTION_MARGIN * at_least` long.
      channels: 1 for gray levels, 3 for RGB, 4 for RGBA.

    Returns:
      uint8 (H, W, channels).

    Raises:
      UndecodableError: the content is cut short, is no image, is one of more pixels than Pillow
        allows (`2 * PIL.Image.MAX_IMAGE_PIXELS`), or one of numbers whose range is not known
        (32-bit integers, floats).
      ConfigError: an argument is of another kind or out of range.

    Example:
      >>> red = np.full((60, 80, 3), (255, 0, 0), np.uint8)
      >>> decode(simplejpeg.encode_jpeg(red)).shape
      (60, 80, 3)
    """
    if channels not in _MODES:
        raise checks.refuse("channels", channels, "1, 3 or 4")
    if at_least is not None:
        at_least = checks.integer("at_least", at_least, 1)
    if not isinstance(encoded, bytes | bytearray | memoryview):
        raise checks.refuse("encoded", encoded, "the content of a file, as bytes")
    try:
        image = _decode_jpeg(encoded, at_least, channels)
        if image is not None:
            return image
        with PIL.Image.open(io.BytesIO(encoded)) as opened:
            return _pixels(opened, channels)
    except PIL.UnidentifiedImageError:
        raise UndecodableError("it is of no kind of image that is known") from None
    except Exception as error:  # Pillow's readers of so many formats raise what they like
        raise UndecodableError(f"{type(error).__name__}: {error}") from error


def resize(image: np.ndarray, size: int, out: np.ndarray | None = None) -> np.ndarray:
    """Resizes to a square, without regard to the aspect ratio, and with antialiasing.

    Along each axis that shrinks, by a ratio r, the image is smoothed with a mixture of two
    triangular kernels whose variance is (r² - 1)/6, and then interpolated linearly, which is a
    convolution with a kernel of variance 1/6. Together they are about the triangle of half-width r
    (variance r²/6) that Pillow's `BILINEAR` uses, at a third of the time.

    Args:
      image: uint8 (H, W, C).
      size: side of the square, in pixels.
      out: where to write the result, or None.

    Returns:
      uint8 (size, size, C).

    Example:
      >>> resize(np.full((30, 40, 3), 7, np.uint8), 10).mean().item()
      7.0
    """
    size = checks.integer("size", size, 1)
    if getattr(image, "dtype", None) != np.uint8 or image.ndim != 3 or not image.size:
        raise checks.refuse("image", image, "uint8 (H, W, C)")
    height, width = image.shape[:2]
    if max(height, width) > size:
        horizontal, vertical = smoothing_kernel(width / size), smoothing_kernel(height / size)
        image = cv2.sepFilter2D(image, -1, horizontal, vertical, borderType=cv2.BORDER_REPLICATE)
    return cv2.resize(image, (size, size), dst=out, interpolation=cv2.INTER_LINEAR)


@functools.lru_cache(maxsize=1024)
def smoothing_kernel(ratio: float) -> np.ndarray:
    """The kernel of variance `(ratio² - 1)/6` that `resize` smooths with; [1] if nothing shrinks.

    The triangle with the weights n - |k| has the variance (n² - 1)/6 if n is an integer. Between
    two such triangles the mixture is chosen that has the variance in question.

    Args:
      ratio: length before over length after.

    Returns:
      float32, of odd length, symmetric, of sum 1.

    Example:
      >>> smoothing_kernel(2.0).tolist()
      [0.25, 0.5, 0.25]
    """
    wide = max(math.ceil(ratio), 1)
    share = (max(ratio, 1) ** 2 - (wide - 1) ** 2) / (wide**2 - (wide - 1) ** 2)
    offsets = np.abs(np.arange(1 - wide, wide))
    triangles = [np.maximum(n - offsets, 0) / n**2 for n in (wide, wide - 1) if n]
    kernel = triangles[0] * share
    if wide > 1:
        kernel += triangles[1] * (1 - share)
    return kernel.astype(np.float32)


def window(length: int, size: int, start: int, crop: int) -> slice:
    """Which pixels of an axis become `[start, start + crop)` once it is resized to `size`.

    Rounded to whole pixels, so that only what is needed is resized: a shift by half a pixel of the
    photograph at most.

    Args:
      length: of the axis before resizing.
      size: after.
      start: of the crop, from 0 to `size - crop`.
      crop: its length, at most `size`.

    Example:
      >>> window(500, 256, 16, 224)
      slice(31, 469, None)
      >>> window(1, 256, 200, 56)
      slice(0, 1, None)
    """
    first, last = round(start * length / size), round((start + crop) * length / size)
    first = min(first, length - 1)  # of an axis of a pixel or two, the last may be half a pixel off
    return slice(first, max(last, first + 1))


def crop_into(out: np.ndarray, encoded: bytes | memoryview, size: int, left: int, top: int) -> None:
    """Writes what an image shows at (`left`, `top`) once it is resized to `size`×`size`.

    Args:
      out: uint8 (crop, crop, 3), crop at most `size`.
      encoded: see `decode`, which may raise `UndecodableError`; then `out` is as it was.
      size: see `resize`.
      left: from 0 to `size - crop`.
      top: likewise.

    Example:
      >>> encoded = simplejpeg.encode_jpeg(np.full((375, 500, 3), 7, np.uint8))
      >>> out = np.zeros((224, 224, 3), np.uint8)
      >>> crop_into(out, encoded, size=256, left=32, top=0)
      >>> out.mean().item()
      7.0
    """
    image, crop = decode(encoded, at_least=size), len(out)
    height, width = image.shape[:2]
    resize(image[window(height, size, top, crop), window(width, size, left, crop)], crop, out)


def _decode_jpeg(
    encoded: bytes | memoryview, at_least: int | None, channels: int
) -> np.ndarray | None:
    """What simplejpeg makes of it; None where Pillow is to try."""
    if simplejpeg is None or channels == 4:
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(encoded)
        if colorspace not in ("Gray", "YCbCr", "RGB"):
            return None
        factor = _reduction(min(height, width), at_least)
        least = [math.ceil(side / factor) for side in (height, width)]
        _check_size(*least)
        return simplejpeg.decode_jpeg(
            encoded,
            "GRAY" if channels == 1 else "RGB",
            min_height=least[0] if factor > 1 else 0,
            min_width=least[1] if factor > 1 else 0,
        )
    except ValueError:  # no JPEG, or one with something wrong, which Pillow may take lightly
        return None


def _check_size(height: int, width: int) -> None:
    """Pillow's limit, for JPEGs that it does not open."""
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit is not None and height * width > 2 * limit:
        raise PIL.Image.DecompressionBombError(
            f"{height * width} pixels are more than the {2 * limit} that are allowed"
        )


def _pixels(image: PIL.Image.Image, channels: int) -> np.ndarray:
    # Pillow's own conversion of gray levels of more than 8 bits clips at 255: all turns white.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        if image.format == "TIFF" and (image.tag_v2.get(258), image.tag_v2.get(262)) != ((16,), 1):
            raise ValueError("a TIFF of 12 bits, or of levels from white to black, is not read")
        image = PIL.Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"a {image.format} image of mode {image.mode} has no known range")
    return np.array(image.convert(_MODES[channels])).reshape(image.height, image.width, channels)


def _reduction(shorter_side: int, at_least: int | None) -> int:
    if at_least is None:
        return 1
    room = shorter_side // (REDUCTION_MARGIN * at_least)
    return max(factor for factor in (1, 2, 4, 8) if factor <= max(room, 1))
