"""Nets with one of everything, which compile fast, and variables without an initialization."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from orthojax.models.nets import Architecture, ConvNet, ResNet
from orthojax.sites import SITE


class SmallPlainNet(ConvNet):
    """A stem, `depth` equal blocks, one that changes the shape, a head."""

    depth: int = 2
    width: int = 4
    num_classes: int = 10
    kernel_init: str = "he"

    @nn.nowrap
    def _architecture(self):
        return Architecture(blocks=(self.depth, 1))


class SmallResNet(ResNet):
    """The residual twin."""

    depth: int = 2
    width: int = 4
    kernel_init: str = "he"

    _architecture = SmallPlainNet._architecture


def filled_variables(module, *arguments):
    """Drawn by NumPy; columns of kernels have norm 1 or so, and some errors exceed the bounds."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *arguments, train=False))
    normal = np.random.default_rng(0).standard_normal

    def fill(path, leaf):
        name = path[-1].key
        if name == SITE:
            return jnp.asarray(np.broadcast_to([1e-3, 1e-2, 0], leaf.shape), leaf.dtype)
        if name == "kernel":
            values = normal(leaf.shape) / np.sqrt(np.prod(leaf.shape[-4:-1]))
        else:
            offset = 1.0 if name in ("var", "scale") else 0.0
            values = offset + 0.1 * normal(leaf.shape)
        return jnp.asarray(values, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, dict(shapes))


def value_and_gradients(net, variables, *arguments):
    """One training pass: gradients, and outputs with new statistics."""

    def loss(params):
        outputs, updated = net.apply(
            {**variables, "params": params}, *arguments, train=True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(outputs)), {"outputs": outputs, **updated}

    return jax.grad(loss, has_aux=True)(variables["params"])


compiled_pass = jax.jit(value_and_gradients, static_argnums=0)


def assert_same(ours, theirs, rtol=2e-3, atol=2e-4):
    """Up to rounding that adds up over layers, relative to each array's largest entry."""
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * float(np.abs(b).max()))
