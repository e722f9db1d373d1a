r"""Batch normalization folded into the convolution below it, for inference.

With running statistics :math:`\mu, \sigma^2`, a convolution and its batch normalization are one:

.. math:: \gamma \frac{W x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta = W' x + b', \qquad
          W' = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}} W, \quad
          b' = \beta - \frac{\gamma \mu}{\sqrt{\sigma^2 + \epsilon}}.

A net without shortcuts is then a chain of convolution, bias and ReLU, and nothing else.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from orthojax.models import BatchNorm, ConvNet, repvgg, unstack_blocks
from orthojax.models.blocks import BN_EPSILON
from orthojax.models.dirac import dirac_kernel

_FOLDED = (  # of a layer
    *("conv", "bn", "dirac_identity", "dirac_scale"),
    *(repvgg.POINT, repvgg.POINT_BN, repvgg.IDENTITY_BN),
)


@dataclasses.dataclass(frozen=True)
class FoldedNet:
    """A net that is applied to what `fold_batch_norm` returns; unrolled, and for inference alone.

    Attributes:
      net: as it was trained.
    """

    net: ConvNet

    def apply(self, variables: Mapping[str, Any], images: jax.Array, train: bool) -> jax.Array:
        """Logits, float32 (N, classes), of normalized images; `train` must be False."""
        if train:
            raise ValueError("a folded net has no batch normalization left to train")
        unrolled = self.net.clone(
            scan=False, remat="none", modulated=False, parametrization="direct"
        )
        with nn.intercept_methods(_add_bias):
            return unrolled.apply({**variables, "batch_stats": {}}, images, train=False)


def fold_batch_norm(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Folds every batch normalization of a `ConvNet`; computed in float64.

    Args:
      variables: `params` and `batch_stats` of a net, scanned or unrolled.

    Returns:
      `{"params": ...}` of the unrolled net, in which a `bn` has a `bias` alone; to be applied by
      `FoldedNet`.
    """
    params = unstack_blocks(variables["params"])
    return {"params": _fold(params, unstack_blocks(variables["batch_stats"]))}


def _fold(params: Mapping[str, Any], statistics: Mapping[str, Any]) -> dict[str, Any]:
    if "bn" not in params:
        return {
            name: _fold(value, statistics.get(name, {})) if isinstance(value, Mapping) else value
            for name, value in params.items()
        }
    affine = {
        name: _affine(params[name], statistics[name])
        for name in ("bn", repvgg.POINT_BN, repvgg.IDENTITY_BN)
        if name in params
    }
    kernel = params["conv"]["kernel"]
    if "dirac_identity" in params:
        kernel = dirac_kernel(kernel, params["dirac_identity"], params["dirac_scale"])
    factors = {name: factor for name, (factor, _) in affine.items()}
    kernel = np.asarray(kernel, np.float64) * factors["bn"]
    if repvgg.POINT in params:
        kernel = repvgg.folded(kernel, factors, params)
    bias = sum(bias for _, bias in affine.values())
    return {
        "conv": {"kernel": jnp.asarray(kernel, jnp.float32)},
        "bn": {"bias": jnp.asarray(bias, jnp.float32)},
        **{name: value for name, value in params.items() if name not in _FOLDED},
    }


def _affine(params, statistics):
    """Factor and bias of a batch normalization, float64 (C,)."""
    given = {**params, **statistics}
    bn = {name: np.asarray(leaf, np.float64) for name, leaf in given.items()}
    factor = bn["scale"] / np.sqrt(bn["var"] + BN_EPSILON)
    return factor, bn["bias"] - factor * bn["mean"]


def _add_bias(call, args, kwargs, context):
    if not isinstance(context.module, BatchNorm):
        return call(*args, **kwargs)
    (x,) = args
    x = x + context.module.variables["params"]["bias"].astype(x.dtype)
    return nn.relu(x) if context.module.relu else x
