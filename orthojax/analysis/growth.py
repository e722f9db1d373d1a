"""How fast the error of a net grows on its way down, measured, at any depth."""

import jax
import jax.numpy as jnp

from orthojax.models import PlainNet, in_order
from orthojax.sites import SITE


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
      >>> net = PlainNet(depth=14, width=4, kernel_init="delta_orthonormal")
      >>> images = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
      >>> log_growth(net, jax.random.key(0), images).shape
      (12,)
    """
    net = net.clone(modulated=True)
    variables = dict(net.init(key, images[:1], train=False))

    def one(path, leaf):
        is_site = path[-1].key == SITE
        return leaf.at[..., :2].set(1) if is_site else leaf

    def loss(params):
        state = {**variables, "params": params}
        logits, _ = net.apply(state, images, train=True, mutable=["batch_stats"])
        return jnp.sum(logits * jax.random.normal(jax.random.fold_in(key, 1), logits.shape))

    grads = jax.grad(loss)(jax.tree_util.tree_map_with_path(one, variables["params"]))
    moments = [leaf[0] for path, leaf in in_order(grads) if path.endswith(SITE)]
    return jnp.log(jnp.stack(moments[:-1]))  # the topmost error has come from no site
