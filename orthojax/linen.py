"""The Flax linen face of modulation."""

import jax
from flax import linen as nn

from orthojax.modulation import Policy, init_state, modulate

# Flax's own name for variables whose "gradient" is their next value
# (flax.linen.fp8_ops introduced it); flax.training.train_state.TrainState overwrites them
# instead of handing them to the optimizer.
MOMENTS = "_overwrite_with_gradient"


class Modulation(nn.Module):
    """A modulation site as a linen module; see `orthojax.modulate`.

    Its state is the variable `moments`, float32 `(7,)`, in the collection
    `_overwrite_with_gradient`. Differentiate the loss with respect to that collection together
    with `params`; an unmodified `flax.training.train_state.TrainState` then overwrites it with
    what comes back. Under `nn.scan` give it an axis:
    `variable_axes={"params": 0, "_overwrite_with_gradient": 0}`.

    Attributes:
      policy: an `orthojax.Policy`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from orthojax import first_link
      >>> class Net(nn.Module):
      ...     @nn.compact
      ...     def __call__(self, x):
      ...         link = first_link()
      ...         for _ in range(3):
      ...             x, link = Modulation()(nn.Dense(4)(x), link)
      ...         return x
      >>> variables = Net().init(jax.random.key(0), jnp.ones((2, 4)))
      >>> jax.tree.map(jnp.shape, variables["_overwrite_with_gradient"]["Modulation_2"])
      {'moments': (7,)}
    """

    policy: Policy = Policy()

    @nn.compact
    def __call__(self, x: jax.Array, link: jax.Array) -> tuple[jax.Array, jax.Array]:
        moments = self.variable(MOMENTS, "moments", init_state)
        return modulate(x, link, moments.value, self.policy)
