"""Augmentation and normalization on the device: the host sends uint8 and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np

from orthojax import checks

# Of ImageNet's training images, on the scale 0 to 255, in RGB; the scale is 1/255 over about the
# standard deviation (0.229). Both as the Caffe models of the time have them, whose numbers these
# are, and the paper.
MEAN_RGB = np.array([123.68, 116.78, 103.94], np.float32)
SCALE = 0.017

# Of the covariance of RGB over ImageNet's training images, on the scale 0 to 1: eigenvalues, and
# eigenvectors as columns. The AlexNet paper (Krizhevsky et al. 2012, section 4.1) describes the
# augmentation and prints no numbers; these are those of fb.resnet.torch, in general use since.
EIGENVALUES = np.array([0.2175, 0.0188, 0.0045], np.float32)
EIGENVECTORS = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]],
    np.float32,
)


def normalize(images: jax.Array, *, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Subtracts the per-pixel mean and divides by the per-pixel standard deviation.

    Args:
      images: uint8 (B, H, W, C).
      mean: float32 (H, W, C) or anything that broadcasts to it, of pixels on the scale 0 to 1, as
        `Dataset.mean` is.
      std: like `mean`, and nowhere zero.

    Returns:
      float32 (B, H, W, C), `(images / 255 - mean) / std`.

    Raises:
      ConfigError: an argument is of another dtype or shape, not finite, or `std` not above 0.

    Example:
      >>> import numpy as np
      >>> normalize(
      ...     np.full((1, 1, 1, 1), 255, np.uint8), mean=np.float32(0.5), std=np.float32(0.25)
      ... )
      Array([[[[2.]]]], dtype=float32)
    """
    check_images("images", images)
    check_statistics(np.shape(images)[1:], mean=mean, std=std)
    scaled = jnp.asarray(images).astype(jnp.float32) / 255
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def augment(
    images: jax.Array, key: jax.Array, *, mean: jax.Array, std: jax.Array, flip: bool
) -> jax.Array:
    """Mirrors each image left to right with probability 1/2, if `flip`, then normalizes it.

    Args:
      images: uint8 (B, H, W, C).
      key: a JAX random key; the same key flips the same images.
      mean: see `normalize`.
      std: see `normalize`.
      flip: whether to mirror at all; a Python bool, static under `jax.jit`. Digits and house
        numbers change their meaning in a mirror, natural images do not.

    Returns:
      float32 (B, H, W, C).

    Raises:
      ConfigError: see `normalize`; or `flip` is not True or False.

    Example:
      >>> import jax, numpy as np
      >>> images = np.zeros((4, 8, 8, 1), np.uint8)
      >>> augment(images, jax.random.key(0), mean=0.0, std=1.0, flip=True).shape
      (4, 8, 8, 1)
    """
    checks.flag("flip", flip)
    check_images("images", images)
    _check_key(key)
    if flip:
        images = mirror(images, key)
    return normalize(images, mean=mean, std=std)


def mirror(images: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors each image left to right with probability 1/2.

    Args:
      images: (B, H, W, C).
      key: a JAX random key.

    Returns:
      The same shape and dtype.

    Example:
      >>> images = np.arange(8).reshape(4, 1, 2, 1)
      >>> mirror(images, jax.random.key(0)).ravel().tolist()
      [0, 1, 2, 3, 5, 4, 7, 6]
    """
    if np.ndim(images) != 4:
        raise checks.refuse("images", images, "an array (B, H, W, C)")
    _check_key(key)
    mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(mirrored, jnp.flip(images, axis=2), images)


def standardize_rgb(images: jax.Array) -> jax.Array:
    """Subtracts ImageNet's mean color and multiplies with 0.017.

    Args:
      images: uint8 or float (B, H, W, 3) on the scale 0 to 255, in RGB.

    Returns:
      float32 (B, H, W, 3), `(images - MEAN_RGB) * SCALE`.

    Example:
      >>> [f"{value:.2f}" for value in standardize_rgb(MEAN_RGB + 100).ravel()]
      ['1.70', '1.70', '1.70']
    """
    if np.shape(images)[-1:] != (3,):
        raise checks.refuse("images", images, "an array (B, H, W, 3)")
    images = jnp.asarray(images).astype(jnp.float32)
    mean = np.expand_dims(MEAN_RGB, tuple(range(images.ndim - 1)))
    return (images - mean) * np.float32(SCALE)


def color_shift(coefficients: jax.Array) -> jax.Array:
    """AlexNet's color augmentation: what to add to the pixels of each image.

    Along each principal component of ImageNet's colors as much as its eigenvalue times a random
    coefficient (Krizhevsky et al. 2012, section 4.1: normal, of standard deviation 0.1).

    Args:
      coefficients: float32 (B, 3), one for each image and component.

    Returns:
      float32 (B, 1, 1, 3), on the scale 0 to 255, in RGB.

    Example:
      >>> shift = color_shift(np.array([[-0.1, 0.0, 0.0]]))
      >>> [f"{value:.1f}" for value in shift.ravel()]  # brighter
      ['3.1', '3.2', '3.2']
    """
    if np.ndim(coefficients) != 2 or np.shape(coefficients)[1] != 3:
        raise checks.refuse("coefficients", coefficients, "an array (B, 3)")
    scaled = coefficients * (255 * EIGENVALUES)
    # Three products and no matrix product, which on TPUs would be one of bfloat16.
    shift = jnp.sum(scaled[:, None, :] * EIGENVECTORS, axis=-1)
    return shift[:, None, None, :]


def augment_photographs(
    images: jax.Array, key: jax.Array, *, flip: bool, color_std: float
) -> jax.Array:
    """Mirrors, shifts the colors of, and standardizes crops of photographs.

    Args:
      images: uint8 (B, H, W, 3), in RGB.
      key: a JAX random key.
      flip: whether to mirror each image with probability 1/2; a Python bool.
      color_std: standard deviation of the coefficients of `color_shift`; a Python float, 0 for
        none.

    Returns:
      float32 (B, H, W, 3).

    Raises:
      ConfigError: `images` are of another dtype or shape, `flip` is not True or False, or
        `color_std` is no number of at least 0.

    Example:
      >>> images = np.zeros((2, 4, 4, 3), np.uint8)
      >>> augment_photographs(images, jax.random.key(0), flip=True, color_std=0.1).shape
      (2, 4, 4, 3)
    """
    check_images("images", images, 3)
    checks.flag("flip", flip)
    checks.number("color_std", color_std, "[0, inf)")
    _check_key(key)
    flip_key, color_key = jax.random.split(key)
    if flip:
        images = mirror(images, flip_key)
    pixels = jnp.asarray(images).astype(jnp.float32)
    if color_std:
        draws = jax.random.normal(color_key, (len(images), 3), jnp.float32)
        pixels = pixels + color_shift(np.float32(color_std) * draws)
    return standardize_rgb(pixels)


def check_images(name: str, images: object, channels: int | None = None) -> None:
    """Raises `ConfigError` for what is not uint8 (N, H, W, C); `images` may be traced."""
    dtype, shape = getattr(images, "dtype", None), np.shape(images) if images is not None else ()
    if dtype != np.uint8 or len(shape) != 4 or channels not in (None, shape[-1]):
        raise checks.refuse(name, images, f"uint8 (N, H, W, {channels or 'C'})")


def _check_key(key: object) -> None:
    typed = isinstance(key, jax.Array) and jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and getattr(key, "dtype", None) != np.uint32:
        raise checks.refuse("key", key, "a JAX random key, such as jax.random.key(0)")


def check_statistics(shape: tuple[int, ...], **statistics: object) -> None:
    """Raises `ConfigError` for a `mean` or `std` that cannot normalize images of a shape."""
    for name, value in statistics.items():
        expected = "finite numbers, above 0 if deviations, that broadcast to one image"
        if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
            continue  # nobody here can look at it
        try:
            array = np.asarray(value)
            fits = np.broadcast_shapes(array.shape, shape) == shape
        except ValueError:  # lists of different lengths, or another shape
            raise checks.refuse(name, value, expected) from None
        numbers = array.dtype.kind in "fiu" and np.isfinite(array).all()
        if not (fits and numbers) or (name == "std" and not (array > 0).all()):
            raise checks.refuse(name, value, expected)
