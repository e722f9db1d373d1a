"""Sharing the regularizer's work between devices that hold copies of the kernels."""

from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from orthojax.parallel.mesh import replicated

# The penalty's gradient takes `n` products for every number of the result, n being the columns of
# the kernel, so from some n on computing it everywhere takes longer than bringing it together. With
# 512 the 34-layer ImageNet net, whose kernels are that wide, would gain on 16 chips of v5e, by the
# compiler's cycles, as much as the links need for it (0.8 against 1.0 ms); the 101-layer net gains.
MIN_COLUMNS = 1024


def shard_penalty(
    transformation: optax.GradientTransformation, mesh: Mesh
) -> optax.GradientTransformation:
    """The same transformation, wide kernels worked on by all devices along `data` together.

    Each device takes an equal part of the kernel's input channels: of a Gram product `WᵀW` its sum
    over these rows, all-reduced, and then its rows of the gradient, which are gathered.

    Args:
      transformation: one that adds to the updates a function of the parameters alone, such as
        `orthojax.optax_ortho`.
      mesh: from `orthojax.parallel.mesh.make_mesh`. Where `fsdp` is more than 1 the kernels are
        split already, and where there is one device there is nothing to share.

    Example:
      >>> from orthojax import optax_ortho
      >>> from orthojax.parallel.mesh import make_mesh
      >>> regularizer = optax_ortho(1e-4)
      >>> shard_penalty(regularizer, make_mesh(data=1)) is regularizer
      True
    """
    devices = mesh.shape["data"]
    if devices == 1 or mesh.shape["fsdp"] > 1:
        return transformation

    def split(leaf: Any) -> Any:
        wide = leaf.ndim >= 2 and leaf.shape[-1] >= MIN_COLUMNS and leaf.shape[-2] % devices == 0
        if not wide:
            return leaf
        spec = PartitionSpec(*[None] * (leaf.ndim - 2), "data", None)
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, spec))

    def update(updates, state, params=None):
        if params is None:
            return transformation.update(updates, state, params)
        nothing = optax.tree.zeros_like(updates)
        added, state = transformation.update(nothing, state, jax.tree.map(split, params))
        # Gathered here: left to itself, the compiler would split the optimizer's work as well,
        # and gather the parameters and all that the optimizer keeps.
        added = jax.lax.with_sharding_constraint(jax.tree.map(split, added), replicated(mesh))
        return optax.tree.add(updates, added), state

    return optax.GradientTransformation(transformation.init, update)
