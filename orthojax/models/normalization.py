r"""Batch normalization, with ReLU and modulation, whose backward pass reads everything once.

For the statistics :math:`\mu, \sigma^2` of m values, :math:`r = (\sigma^2 + \epsilon)^{-1/2}`,
:math:`\hat x = r (x - \mu)` and :math:`y = \gamma \hat x + \beta`, the error at the input is

.. math:: \delta = \gamma r \, (g - a - b \hat x), \qquad a = E[g], \quad b = E[g \hat x],

where g is the error at y. Its second moment needs no pass of its own, since :math:`E[\hat x] = 0`
and :math:`E[\hat x^2] = \sigma^2 r^2`:

.. math:: E[\delta^2] = (\gamma r)^2 \, (E[g^2] - a^2 - (2 - \sigma^2 r^2) b^2).

So a modulation site in front of batch normalization costs one more sum beside the two that are
needed anyway, and its :math:`\rho` is one factor more of :math:`\gamma r`. Of the activations the
backward pass keeps x alone; autodiff would keep what lies between as well.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from orthojax import checks
from orthojax.linen import site_of
from orthojax.sites import rescaling, vary_like


class BatchNorm(nn.Module):
    """Modulation site, batch normalization and ReLU in one; modulation and ReLU are optional.

    The same function, and the same gradient, as `orthojax.modulate`, `flax.linen.BatchNorm` and
    `jax.nn.relu` one after the other, in less time and memory. Parameters and statistics have the
    names, shapes and dtypes of `flax.linen.BatchNorm`; the site is one parameter more.

    With `groups` the batch is cut into so many consecutive groups of equal size, and each is
    normalized by its own mean and variance ("ghost" batch normalization; Hoffer et al. 2017,
    arXiv:1705.08741), and modulated by its own moment. With as many groups as devices no statistic
    crosses devices, which is what `jax.pmap` programs do; and since the number belongs to the
    model, the result does not depend on the devices there are. The running statistics are averages
    over the groups.

    Attributes:
      use_running_average: normalize by the running statistics.
      relu: whether `max(y, 0)` follows.
      modulated: whether there is a modulation site in front; see `orthojax.modulation`.
      groups: number of groups; it must divide the batch.
      momentum: of the running statistics.
      epsilon: added to the variance.
      dtype: of the result; statistics are computed in float32.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.

    Called with x, float (N, ..., C); returns the same shape.

    Raises:
      ConfigError: an impossible number or dtype; x is not floating; `groups` does not divide N.

    Example:
      >>> norm = BatchNorm(use_running_average=False, groups=2)
      >>> x = jnp.asarray([1.0, 3.0, 10.0, 30.0])[:, None]
      >>> y, _ = norm.init_with_output(jax.random.key(0), x)
      >>> y[:, 0].round(2)
      Array([-1.,  1., -1.,  1.], dtype=float32)
    """

    use_running_average: bool
    relu: bool = False
    modulated: bool = False
    groups: int = 1
    momentum: float = 0.99
    epsilon: float = 1e-5
    dtype: Any = jnp.float32
    bias_init: Callable[..., Any] = nn.initializers.zeros_init()
    scale_init: Callable[..., Any] = nn.initializers.ones_init()

    def __post_init__(self):
        for name in ("use_running_average", "relu", "modulated"):
            checks.flag(name, getattr(self, name))
        checks.integer("groups", self.groups, 1)
        checks.number("momentum", self.momentum, "[0, 1]", traced=True)
        checks.number("epsilon", self.epsilon, "[0, inf)", traced=True)
        checks.dtype("dtype", self.dtype)
        for name in ("bias_init", "scale_init"):
            checks.function(
                name, getattr(self, name), "an initializer (key, shape, dtype) -> array"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = checks.array("x", x, 2)
        features = x.shape[-1:]
        mean = self.variable("batch_stats", "mean", jnp.zeros, features, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        affine = (
            self.param("scale", self.scale_init, features, jnp.float32),
            self.param("bias", self.bias_init, features, jnp.float32),
        )
        site = site_of(self) if self.modulated else None
        form = _Form(self.epsilon, self.relu, jnp.dtype(self.dtype))
        if self.use_running_average:
            return _apply(form, x, *(_expand(v, x) for v in (mean.value, var.value, *affine)))
        if x.shape[0] % self.groups:
            raise checks.refuse("groups", self.groups, f"a divisor of {x.shape[0]}, the batch of x")
        grouped = x.reshape(self.groups, -1, *x.shape[1:])
        affine = (_expand(v, grouped) for v in affine)
        y, *statistics = _normalize(form, grouped, *vary_like(x, (*affine, site)))
        if not self.is_initializing():
            for running, found in zip((mean, var), statistics, strict=True):
                average = jnp.mean(found.reshape(self.groups, -1), axis=0)
                running.value = self.momentum * running.value + (1 - self.momentum) * average
        return y.reshape(x.shape)


@dataclasses.dataclass(frozen=True)
class _Form:
    """What of a `BatchNorm` is static."""

    epsilon: float
    relu: bool
    dtype: Any


def _expand(features, x):
    """(C,) as (1, ..., C), of the rank of x: nothing here relies on implicit rank promotion."""
    return features.reshape((1,) * (x.ndim - 1) + features.shape)


def _axes(x):
    return tuple(range(1, x.ndim - 1))  # of (groups, N / groups, ..., C)


def _apply(form, x, mean, var, scale, bias):
    y = (x.astype(jnp.float32) - mean) * (jax.lax.rsqrt(var + form.epsilon) * scale) + bias
    return (jnp.maximum(y, 0) if form.relu else y).astype(form.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _normalize(form, x, scale, bias, site):
    """(groups, N / groups, ..., C) to the same, and mean and variance (groups, 1, ..., C)."""
    del site
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, _axes(x), keepdims=True)
    # flax.linen.BatchNorm's formula, which needs one pass.
    var = jnp.maximum(0.0, jnp.mean(jnp.square(wide), _axes(x), keepdims=True) - jnp.square(mean))
    return _apply(form, x, mean, var, scale, bias), mean, var


def _forward(form, x, scale, bias, site):
    y, mean, var = _normalize(form, x, scale, bias, site)
    return (y, mean, var), (x, mean, var, scale, bias, site)


def _backward(form, residuals, cotangents):
    x, mean, var, scale, bias, site = residuals
    error, _, _ = cotangents  # nothing is differentiated through the running statistics
    error = error.astype(jnp.float32)
    root = jax.lax.rsqrt(var + form.epsilon)
    normalized = (x.astype(jnp.float32) - mean) * root
    if form.relu:
        error = jnp.where(normalized * scale + bias > 0, error, 0)
    average = functools.partial(jnp.mean, axis=_axes(x), keepdims=True)
    a, b = average(error), average(error * normalized)
    factor, measured = scale * root, None
    if site is not None:
        power = average(jnp.square(error)) - a**2 - (2 - var * root**2) * b**2
        # One moment for each group, so that none waits for another's.
        moments = jnp.mean(jnp.square(factor) * jnp.maximum(power, 0), axis=tuple(range(1, x.ndim)))
        rho, measured = jax.vmap(lambda moment: rescaling(moment, site, x.dtype))(moments)
        measured = jnp.mean(measured, axis=0)
        factor = rho.reshape(-1, *(1,) * (x.ndim - 1)) * factor
    delta = (factor * (error - a - b * normalized)).astype(x.dtype)
    count = x.size // (x.shape[0] * x.shape[-1])
    gradients = (count * jnp.sum(s, axis=0, keepdims=True) for s in (b, a))
    return delta, *gradients, measured


_normalize.defvjp(_forward, _backward)
