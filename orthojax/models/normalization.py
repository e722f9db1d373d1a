"""Batch normalization over groups of the batch, as it is without communication between devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


class GroupedBatchNorm(nn.Module):
    """`flax.linen.BatchNorm` whose statistics are those of a group of examples, not of the batch.

    The batch is cut into `groups` consecutive groups of equal size, and each is normalized by its
    own mean and variance ("ghost" batch normalization; Hoffer et al. 2017, arXiv:1705.08741). With
    as many groups as devices no statistic crosses devices, which is what `jax.pmap` programs do;
    and since the number belongs to the model, the result does not depend on the devices there are.
    The running statistics are averages over the groups. Parameters and statistics have the names,
    shapes and dtypes of `flax.linen.BatchNorm`, so that a net may change from one to the other.

    Attributes:
      groups: number of groups; it must divide the batch.
      use_running_average: normalize by the running statistics.
      momentum: of the running statistics.
      epsilon: added to the variance.
      dtype: of the result; statistics are computed in float32.
      bias_init: initializer of the bias.

    Called with x, float (N, ..., C); returns the same shape.

    Raises:
      ValueError: `groups` does not divide N.

    Example:
      >>> norm = GroupedBatchNorm(groups=2, use_running_average=False)
      >>> x = jnp.asarray([1.0, 3.0, 10.0, 30.0])[:, None]
      >>> y, _ = norm.init_with_output(jax.random.key(0), x)
      >>> y[:, 0].round(2)
      Array([-1.,  1., -1.,  1.], dtype=float32)
    """

    groups: int
    use_running_average: bool
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = x.shape[-1]
        running = {
            "mean": self.variable("batch_stats", "mean", jnp.zeros, (features,), jnp.float32),
            "var": self.variable("batch_stats", "var", jnp.ones, (features,), jnp.float32),
        }
        scale = self.param("scale", nn.initializers.ones_init(), (features,), jnp.float32)
        bias = self.param("bias", self.bias_init, (features,), jnp.float32)
        if self.use_running_average:
            return self._normalize(x, running["mean"].value, running["var"].value, scale, bias)
        if x.shape[0] % self.groups:
            raise ValueError(f"{self.groups} groups do not divide a batch of {x.shape[0]}")
        grouped = x.reshape(self.groups, -1, *x.shape[1:])
        axes = tuple(range(1, grouped.ndim - 1))
        wide = grouped.astype(jnp.float32)
        mean = jnp.mean(wide, axes, keepdims=True)
        # flax.linen.BatchNorm's formula, which needs one pass.
        var = jnp.maximum(0.0, jnp.mean(jnp.square(wide), axes, keepdims=True) - mean**2)
        if not self.is_initializing():
            for name, value in (("mean", mean), ("var", var)):
                average = jnp.mean(value.reshape(self.groups, features), axis=0)
                variable = running[name]
                variable.value = self.momentum * variable.value + (1 - self.momentum) * average
        return self._normalize(grouped, mean, var, scale, bias).reshape(x.shape)

    def _normalize(self, x, mean, var, scale, bias):
        y = (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias
        return y.astype(self.dtype)
