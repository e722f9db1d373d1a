"""Augmentation and normalisation on the device: the host sends uint8 and nothing else."""

import jax
import jax.numpy as jnp


def normalize(images: jax.Array, *, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Subtracts the per-pixel mean and divides by the per-pixel standard deviation.

    Args:
      images: uint8 (B, H, W, C).
      mean: float32 (H, W, C) or anything that broadcasts to it, of pixels on the scale 0 to 1, as
        `Dataset.mean` is.
      std: like `mean`, and nowhere zero.

    Returns:
      float32 (B, H, W, C), `(images / 255 - mean) / std`.

    Example:
      >>> import numpy as np
      >>> normalize(
      ...     np.full((1, 1, 1, 1), 255, np.uint8), mean=np.float32(0.5), std=np.float32(0.25)
      ... )
      Array([[[[2.]]]], dtype=float32)
    """
    scaled = jnp.asarray(images).astype(jnp.float32) / 255
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def augment(
    images: jax.Array, key: jax.Array, *, mean: jax.Array, std: jax.Array, flip: bool
) -> jax.Array:
    """Mirrors each image left to right with probability 1/2, if `flip`, then normalises it.

    Args:
      images: uint8 (B, H, W, C).
      key: a JAX random key; the same key flips the same images.
      mean: see `normalize`.
      std: see `normalize`.
      flip: whether to mirror at all; a Python bool, static under `jax.jit`. Digits and house
        numbers change their meaning in a mirror, natural images do not.

    Returns:
      float32 (B, H, W, C).

    Example:
      >>> import jax, numpy as np
      >>> images = np.zeros((4, 8, 8, 1), np.uint8)
      >>> augment(images, jax.random.key(0), mean=0.0, std=1.0, flip=True).shape
      (4, 8, 8, 1)
    """
    if flip:
        mirrored = jax.random.bernoulli(key, 0.5, (images.shape[0], 1, 1, 1))
        images = jnp.where(mirrored, jnp.flip(images, axis=2), images)
    return normalize(images, mean=mean, std=std)
