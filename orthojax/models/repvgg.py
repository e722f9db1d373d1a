r"""Layers of linear branches that become one convolution (Ding et al. 2021, arXiv:2101.03697).

While training a layer is

.. math:: \mathrm{BN}(K_3 * x) + \mathrm{BN}(K_1 * x) + \mathrm{BN}(x),

with a 3×3 and a 1×1 kernel, the last branch where the shape stays; the ReLU follows the sum. For
inference `orthojax.inference.folding` makes it one 3×3 convolution with a bias.

With BN scales of :math:`1/\sqrt n` for n branches and the bias on one of them, a layer has the
variance and the growth of the error of a Conv-BN-ReLU layer with that bias, as far as the branches
are uncorrelated: each brings 1/n of both. So `orthojax.isometry.isometric_bias` solves the bias
from the depth here too.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

POINT, POINT_BN, IDENTITY_BN = "point", "point_bn", "identity_bn"


def centers(x: jax.Array, stride: int, window: int) -> jax.Array:
    """What the center tap of a convolution with "SAME" padding reads of images (N, H, W, C).

    Example:
      >>> import jax.numpy as jnp
      >>> centers(jnp.arange(6.0).reshape(1, 6, 1, 1), 2, 3)[0, :, 0, 0].tolist()
      [1.0, 3.0, 5.0]
    """
    starts = []
    for size in x.shape[1:3]:
        padding = max((-(-size // stride) - 1) * stride + window - size, 0)
        starts.append((window - 1) // 2 - padding // 2)
    return x[:, starts[0] :: stride, starts[1] :: stride]


def folded(
    kernel: np.ndarray, factors: Mapping[str, np.ndarray], params: Mapping[str, Any]
) -> np.ndarray:
    """The kernel (H, W, C, M) of all branches together.

    Args:
      kernel: of the largest window, multiplied with the factor of its normalization.
      factors: scale over standard deviation of the normalizations of the other branches, (M,).
      params: of the layer.
    """
    kernel, center = kernel.copy(), tuple((size - 1) // 2 for size in kernel.shape[:2])
    kernel[center] += np.asarray(params[POINT]["kernel"], np.float64)[0, 0] * factors[POINT_BN]
    if IDENTITY_BN in factors:
        kernel[center] += np.diag(factors[IDENTITY_BN])
    return kernel
