"""The activations that a net may have in the place of ReLU, and what each needs of its kernels."""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation, as a net's layers apply it.

    Attributes:
      make: returns the function, or module, x -> y; called inside a module, once for each layer.
      copies: channels that come out for each that goes in.
    """

    make: Callable[[], Callable[[jax.Array], jax.Array]]
    copies: int = 1


class ShiftedRelu(nn.Module):
    """max(x, b), with a trained `shift` b for each channel that begins at -1.

    Source: Qi et al. 2020, arXiv:2006.16992, equation 9.
    """

    @nn.compact
    def __call__(self, x):
        shift = self.param("shift", nn.initializers.constant(-1.0), x.shape[-1:], jnp.float32)
        shift = shift.reshape((1,) * (x.ndim - 1) + shift.shape).astype(x.dtype)
        return jnp.maximum(x, shift)


class ParametricRelu(nn.Module):
    """max(x, 0) + s·min(x, 0), with a trained `slope` s for each channel that begins at 1.

    So a net begins linear, an isometry at any depth if its kernels are, and becomes nonlinear as
    it learns. Source of the activation: He et al. 2015, arXiv:1502.01852.
    """

    carry: float = 1.0

    @nn.compact
    def __call__(self, x):
        def first(key, shape, dtype):
            return (jnp.arange(shape[-1]) < round(self.carry * shape[-1])).astype(dtype)

        slope = self.param("slope", first, x.shape[-1:], jnp.float32)
        slope = slope.reshape((1,) * (x.ndim - 1) + slope.shape).astype(x.dtype)
        return jnp.where(x > 0, x, slope * x)


def crelu(x):
    """ReLU of x and of -x, side by side in twice the channels (Shang et al. 2016)."""
    return jnp.concatenate([jax.nn.relu(x), jax.nn.relu(-x)], axis=-1)


@functools.cache  # a net asks whenever it is traced
def _tailored_relu(layers):
    from orthojax.mean_field import tailored_slope  # half a second of SciPy that others save

    slope = tailored_slope(layers)
    gain = math.sqrt(2 / (1 + slope**2))
    return Activation(lambda: lambda x: gain * jnp.where(x > 0, x, slope * x))


@functools.cache  # a net asks whenever it is traced
def _shaped_softplus(layers):
    from orthojax.mean_field import shaped_softplus

    form = functools.partial(shaped_softplus(layers), logaddexp=jnp.logaddexp)
    return Activation(lambda: form)


#: Name -> the `Activation` of a net of so many layers with one.
ACTIVATIONS: dict[str, Callable[[int], Activation]] = {
    "relu": lambda layers: Activation(lambda: jax.nn.relu),
    "tanh": lambda layers: Activation(lambda: jnp.tanh),
    "crelu": lambda layers: Activation(lambda: crelu, copies=2),
    "prelu": lambda layers: Activation(ParametricRelu),
    "prelu_half": lambda layers: Activation(lambda: ParametricRelu(0.5)),
    "shifted_relu": lambda layers: Activation(ShiftedRelu),
    "tailored_relu": _tailored_relu,
    "shaped_softplus": _shaped_softplus,
}
