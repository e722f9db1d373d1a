"""The train state: everything that changes during training, and nothing else."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from orthojax.linen import MOMENTS


@flax.struct.dataclass
class TrainState:
    """What a step maps to its successor, and what a checkpoint holds.

    Attributes:
      step: int32 scalar, number of finished updates.
      params: parameters of the net.
      batch_stats: running BN statistics.
      moments: states of the modulation sites; empty without modulation.
      opt_state: state of the optax transformation.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    moments: Any
    opt_state: optax.OptState


def init_state(
    net: nn.Module,
    optimizer: optax.GradientTransformation,
    image_shape: tuple[int, int, int],
    seed: int,
) -> TrainState:
    """A state before the first update; pure, so it can be jitted or only shape-evaluated.

    Args:
      net: called as `net(images, train=...)`.
      optimizer: its state is made from the parameters.
      image_shape: (H, W, C).
      seed: the parameters are a function of it; an integer or a uint32 scalar.
    """
    images = jnp.zeros((1, *image_shape), jnp.float32)
    variables = net.init(jax.random.key(seed), images, train=False)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        moments=variables.get(MOMENTS, {}),
        opt_state=optimizer.init(variables["params"]),
    )
