"""The penalty `‖WᵀW − I‖_F²` (Eq. 3 of Xie et al. 2017), and its gradient in closed form.

`W` is a block of shape `(f_in, n)`, and `optax_ortho` adds the gradient of `λ/2 Σ P` over all
blocks of all kernels: with `E = WᵀW − I` that of `P/2` is `2 W E = 2 (WWᵀ − I) W`. The smaller of
the two Gram matrices is enough, for the penalty as well: the other differs by `|f_in − n|`.

Both functions take blocks `(blocks, *inputs, n)` in float32 or float64, and `identity`, the target
of `WᵀW`: `(blocks, n, n)` with zeros on the diagonal where a column is padding, or `(1, n, n)` if
that is the same for all.
"""

import math

import jax
import jax.numpy as jnp

from orthojax.matrices import gram, times


def penalty(blocks: jax.Array, identity: jax.Array) -> jax.Array:
    """`‖WᵀW − I‖_F²` of every block, shape `(blocks,)`."""
    rows, columns = math.prod(blocks.shape[1:-1]), blocks.shape[-1]
    if columns <= rows:
        return jnp.sum((gram(blocks) - identity) ** 2, axis=(1, 2))
    return jnp.sum((_row_gram(blocks) - _eye(blocks, rows)) ** 2, axis=(1, 2)) + columns - rows


def gradient(blocks: jax.Array, identity: jax.Array) -> jax.Array:
    """`∂(P/2)/∂W = 2 W (WᵀW − I)` of every block, the shape of `blocks`."""
    rows, columns = math.prod(blocks.shape[1:-1]), blocks.shape[-1]
    if columns <= rows:
        return 2 * times(blocks, gram(blocks) - identity)
    flat = blocks.reshape((blocks.shape[0], rows, columns))
    return 2 * times(_row_gram(blocks) - _eye(blocks, rows), flat).reshape(blocks.shape)


def _row_gram(blocks):
    flat = blocks.reshape((blocks.shape[0], -1, blocks.shape[-1]))
    return gram(flat.transpose(0, 2, 1))


def _eye(blocks, size):
    return jnp.eye(size, dtype=blocks.dtype)[None]
