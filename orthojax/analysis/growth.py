"""How fast the error of a net grows on its way down, measured, at any depth."""

import jax
import jax.numpy as jnp

from orthojax.linen import MOMENTS
from orthojax.models import PlainNet, in_order
from orthojax.modulation import Policy, read

# Every site hands down what it was handed, so that nothing over- or underflows over any depth.
_ISOMETRIC = Policy(mode="direct", tolerance=0.0, max_scale=1e30)


def log_growth(net: PlainNet, key: jax.Array, images: jax.Array) -> jax.Array:
    r"""Growth of the squared error per layer at initialization, from each convolution to the next.

    The error enters as a random cotangent of the logits. Modulation in direct mode keeps it of one
    size, and its :math:`-\log \rho^2` is the growth: what the error would have grown by, since the
    backward pass is linear.

    Args:
      net: its modulation is replaced.
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
    net = net.clone(modulation=_ISOMETRIC)
    variables = dict(net.init(key, images[:1], train=False))

    def loss(moments):
        state = {**variables, MOMENTS: moments}
        logits, _ = net.apply(state, images, train=True, mutable=["batch_stats"])
        return jnp.sum(logits * jax.random.normal(jax.random.fold_in(key, 1), logits.shape))

    moments = jax.grad(loss)(variables[MOMENTS])
    ratios = [read(state).log_ratio for _, state in in_order(moments)]
    return -jnp.stack(ratios[:-1])  # the topmost site has none above it to compare with
