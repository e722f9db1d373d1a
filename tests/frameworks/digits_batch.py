"""What the tests of other frameworks train on: a batch of digits and its loss."""

import functools

import jax.numpy as jnp
import numpy as np
import optax

from orthojax import data


@functools.cache
def digits():
    """Images float32 (128, 8, 8, 1), about normalized, and labels, of the training split."""
    split = data.load("digits").train
    rows = np.random.default_rng(0).permutation(len(split))[:128]
    return jnp.asarray(split.images[rows] / 128.0 - 0.6, jnp.float32), split.labels[rows]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
