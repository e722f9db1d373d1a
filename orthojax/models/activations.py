"""The activations that a net may have instead of ReLU, and what each needs of its kernels."""

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
    """max(x, 0) + s·min(x, 0), with a trained slope s for each channel.

    Source: He et al. 2015, arXiv:1502.01852.

    Attributes:
      carry: share of the channels, the first, whose slope begins at 1, so that they pass unchanged;
        that of the others begins at 0, a ReLU.
    """

    carry: float = 0.0

    @nn.compact
    def __call__(self, x):
        def first(key, shape, dtype):
            del key
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


#: Name -> the `Activation` of a net of so many layers with one, and so large a share of carrying
#: channels.
ACTIVATIONS: dict[str, Callable[[int, float], Activation]] = {
    "relu": lambda layers, carry: Activation(lambda: jax.nn.relu),
    "tanh": lambda layers, carry: Activation(lambda: jnp.tanh),
    "crelu": lambda layers, carry: Activation(lambda: crelu, copies=2),
    "prelu": lambda layers, carry: Activation(functools.partial(ParametricRelu, carry)),
    "shifted_relu": lambda layers, carry: Activation(ShiftedRelu),
    "tailored_relu": lambda layers, carry: _tailored_relu(layers),
    "shaped_softplus": lambda layers, carry: _shaped_softplus(layers),
}
