"""Orthogonality of the convolution itself, not of the flattened kernel."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from orthojax.ortho.variants import Checked


@dataclasses.dataclass(frozen=True)
class Conv(Checked):
    """How far the convolution, as a linear operator on images, is from orthogonal; stride aware.

    At every frequency `ω` a convolution multiplies the channels by its transfer matrix
    `K(ω) = Σ_x K[x] exp(-i x·ω)`, of shape `(C, M)`. A convolution of stride `s` is one of stride
    1 on `C·s²` channels (in two dimensions), the `s × s` places of a patch side by side, with a
    window of `ceil(window / s)`; `C` is that number from here on. Then

        P(K) = mean over ω of ‖G(ω) − I‖_F²,   G = KᴴK if M <= C, else KKᴴ.

    `P = 0` if and only if the operator has orthonormal rows (`M <= C`: cotangents keep their norm)
    or orthonormal columns (`M >= C`: signals keep theirs). The mean is over `2·window − 1`
    frequencies a side, which is exact: it is the sum over all places at which two windows
    overlap,

        Σ_{d, m, n} (Σ_{x, c} K[x, c, m] K[x + s·d, c, n] − [d = 0][m = n])² − max(0, M − C),

    the form in which the sources have it. It is exact for circular padding on images of at least
    so many patches; zero padding differs at the border alone. The gradient of `P/2` is
    `2 K(ω) (KᴴK − I)`, transformed back. Kernels without a window (dense) have the Frobenius
    penalty of the smaller side, as do convolutions whose window is covered by the stride.

    Sources: Wang et al. 2020, arXiv:1911.12207 (OCNN); Achour et al. 2022, arXiv:2108.05623 (rows,
    columns and the constant between them; when zero can be reached).

    The window axes and strides come from the view (`KernelAxes.spatial`, `KernelAxes.strides`;
    `strides=` of the ready-made views). Columns are not grouped.

    Raises:
      ConfigError: `grouped` is no boolean.

    Example:
      >>> import jax
      >>> from orthojax.initializers import delta_orthonormal
      >>> from orthojax.ortho import ortho_penalty
      >>> kernel = delta_orthonormal()(jax.random.key(0), (3, 3, 8, 4))
      >>> bool(ortho_penalty({"kernel": kernel}, 2.0, variant="conv") < 1e-9)
      True
    """

    grouped: bool = False

    def penalty(self, blocks, identity, layout):
        real, imaginary = _transfer(blocks, layout)
        even, odd = _excess(real, imaginary)
        per_frequency = jnp.sum(even**2, axis=(2, 3)) + jnp.sum(odd**2, axis=(2, 3))
        return per_frequency @ _weights(layout, blocks.dtype)

    def gradient(self, blocks, identity, layout):
        # `_transfer` is linear: its transpose takes cotangents of the transfer matrices back to the
        # kernel.
        real, imaginary = _transfer(blocks, layout)
        to_kernel = jax.linear_transpose(lambda x: _transfer(x, layout), blocks)
        even, odd = _excess(real, imaginary)
        weights = 2 * _weights(layout, blocks.dtype)[None, :, None, None]
        into_real = _matmul(real, even) - _matmul(imaginary, odd)
        into_imaginary = _matmul(real, odd) + _matmul(imaginary, even)
        (gradient,) = to_kernel((weights * into_real, weights * into_imaginary))
        return gradient


def _transfer(blocks, layout):
    """Real and imaginary part of the transfer matrices, `(blocks, frequencies, tall, narrow)`."""
    taps = _patches(blocks, layout)
    if taps.shape[-1] > taps.shape[-2]:
        taps = jnp.swapaxes(taps, -1, -2)
    phase = _phases(layout)
    return tuple(
        jnp.einsum("ft,btcm->bfcm", jnp.asarray(part, taps.dtype), taps, precision="highest")
        for part in (np.cos(phase), -np.sin(phase))
    )


def _excess(real, imaginary):
    """Real and imaginary part of `KᴴK − I`."""
    both = jnp.concatenate([real, imaginary], axis=-2)
    eye = jnp.eye(both.shape[-1], dtype=both.dtype)[None, None]
    even = _matmul(jnp.swapaxes(both, -1, -2), both) - eye
    cross = _matmul(jnp.swapaxes(real, -1, -2), imaginary)
    return even, cross - jnp.swapaxes(cross, -1, -2)


def _patches(blocks, layout):
    """Blocks `(blocks, *inputs, M)` as `(blocks, taps, C, M)` of the convolution of stride 1."""
    rest = [axis for axis in range(len(layout.inputs)) if axis not in layout.spatial]
    order = (0, *(1 + a for a in layout.spatial), *(1 + a for a in rest), blocks.ndim - 1)
    places, strides = _places_and_strides(layout)
    blocks = blocks.transpose(order)
    # Fill the window up to a multiple of the stride, then cut every axis in (places, stride).
    window = [layout.inputs[axis] for axis in layout.spatial]
    fill = [(0, p * s - k) for p, s, k in zip(places, strides, window, strict=True)]
    blocks = jnp.pad(blocks, [(0, 0), *fill, *((0, 0) for _ in rest), (0, 0)])
    pairs = [size for pair in zip(places, strides, strict=True) for size in pair]
    blocks = blocks.reshape((blocks.shape[0], *pairs, -1, layout.columns))
    count = len(places)
    place_axes = tuple(1 + 2 * i for i in range(count))
    stride_axes = tuple(2 + 2 * i for i in range(count))
    blocks = blocks.transpose((0, *place_axes, *stride_axes, 1 + 2 * count, 2 + 2 * count))
    return blocks.reshape((blocks.shape[0], math.prod(places), -1, layout.columns))


def _places_and_strides(layout):
    """The window of the convolution of stride 1, and the strides that are seen by a window."""
    window = [layout.inputs[axis] for axis in layout.spatial]
    places = [-(-k // s) for k, s in zip(window, layout.strides, strict=True)]
    return places, [min(k, s) for k, s in zip(window, layout.strides, strict=True)]


def _phases(layout):
    """`x·ω` of all taps and of one of every conjugate pair of frequencies: `(frequencies, taps)`.

    The first frequency is zero, its own conjugate; all periods are odd, so there is no other such.
    """
    places, _ = _places_and_strides(layout)
    periods = [2 * size - 1 for size in places]
    frequencies = [
        number
        for number in itertools.product(*map(range, periods))
        if number <= tuple(-n % period for n, period in zip(number, periods, strict=True))
    ]
    taps = list(itertools.product(*map(range, places)))
    angles = 2 * np.pi * np.array(frequencies, float) / np.array(periods, float)
    return angles @ np.array(taps, float).T


def _weights(layout, dtype):
    """The share of each frequency of `_phases`, and its conjugate, in the mean over all."""
    pairs = len(_phases(layout)) - 1
    return jnp.asarray(np.array([1] + [2] * pairs) / (1 + 2 * pairs), dtype)


def _matmul(left, right):
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
