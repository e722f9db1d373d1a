"""How fast the error of a net grows on its way down, measured, at any depth."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from orthojax.models import PlainNet, in_order
from orthojax.sites import SITE, is_site, measurement


def log_growth(net: PlainNet, key: jax.Array, images: jax.Array) -> jax.Array:
    r"""Growth of the squared error per layer at initialization, from each convolution to the next.

    The error enters as a random cotangent of the logits. Every modulation site hands it down with a
    second moment of 1, so the moment that arrives at the next is what it has grown by: the backward
    pass is linear, and over any depth nothing over- or underflows.

    Args:
      net: with or without sites.
      key: of the parameters and the cotangent.
      images: float (N, H, W, C).

    Returns:
      float32 (layers - 1,), natural logarithms, from the images to the logits; their sum is that of
      the growth from the last convolution to the first.

    Example:
      >>> net = PlainNet(depth=8, width=2, kernel_init="delta_orthonormal")
      >>> images = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
      >>> log_growth(net, jax.random.key(0), images).shape
      (6,)
    """
    net = net.clone(modulated=True)

    @jax.jit  # one program; the net is no argument, since its numbers may be traced
    def measure(key, images):
        variables = net.init(key, images[:1], train=False)
        moments = site_moments(net, variables, jax.random.fold_in(key, 1), images)
        return jnp.log(moments[:-1])  # the topmost error has come from no site

    return measure(key, images)


def site_moments(
    net: PlainNet, variables: Mapping[str, Any], key: jax.Array, images: jax.Array
) -> jax.Array:
    """What arrives at every site when each hands the error down with a second moment of 1.

    Args:
      net: with sites.
      variables: of the net, its sites' among them; what they hold does not matter.
      key: of the cotangent of the logits.
      images: float (N, H, W, C).

    Returns:
      float32 (layers,), from the images to the logits.
    """

    def one(path, leaf):
        return leaf.at[..., :2].set(1) if is_site(path) else leaf

    def loss(params):
        state = {**variables, "params": params}
        logits, _ = net.apply(state, images, train=True, mutable=["batch_stats"])
        return jnp.sum(logits * jax.random.normal(key, logits.shape))

    grads = jax.grad(loss)(jax.tree_util.tree_map_with_path(one, variables["params"]))
    return jnp.stack(
        [measurement(leaf)[0] for path, leaf in in_order(grads) if path.endswith(SITE)]
    )
