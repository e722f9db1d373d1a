r"""Modulation: the backward pass keeps the second moment of the error near one reference.

Xie, Xiong and Pu (CVPR 2017, sections 3.3 and 4) rescale the error on its way down a deep net.
With :math:`q = E[\delta^2]`, the mean over batch, space and channels of the squared cotangent at
the output of a parametric layer, and :math:`\bar q` that of the topmost layer,

.. math:: \delta \leftarrow \rho\,\delta, \qquad
          \rho = \sqrt{\mathrm{clip}(q,\ \bar q / T,\ \bar q\, T) / q},

so that the error is never more than `T` times, or less than one `T`-th of, what enters at the top.
Two pieces do that:

* a *site* (:func:`modulate`) behind a layer: the identity forward, `ρ·δ` backward. It holds the
  two bounds and nothing else; the moment is that of the very cotangent that arrives. The
  "gradient" of a site is what it measured, in units so small that no norm of gradients sees it.
* an optax transformation (:func:`orthojax.modulation`) around any optimizer. It takes the measured
  moments out of the gradients, keeps the running moment :math:`\bar q`, and sets the bounds.

Sites know nothing of each other, so chains, branches, shortcuts, scans, rematerialization and
layers that are used twice need nothing special.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from orthojax import checks
from orthojax.errors import ConfigError
from orthojax.matrices import accumulation_dtype

#: A parameter is a site if this is its name, in whichever framework.
SITE = "modulation_site"

# A site without bounds stops the error only short of overflow: at a root mean square of
# max ** (1/4) of its dtype (4e9 in float32 and bfloat16, 16 in float16), far above any sane one.
_CEILING_EXPONENT = 0.25
_SITE_DTYPES = ("float32", "bfloat16", "float64")

# Units of a site's gradient. A norm squares them: the weight's vanishes, and so does the moment's
# beside the gradients of the weights, which are of the order of its root.
_MOMENT, _WEIGHT = 2.0**-24, 2.0**-64


def init_site(position: float = 0.0, shape: tuple[int, ...] = ()) -> jax.Array:
    """A fresh site: `[low, high, position]`, float32, with bounds of 0, which is none.

    Args:
      position: where the site stands, counted from the input upward: the one with the largest
        position (the last of equals) gives the reference. A negative one marks a site at the
        output of the net, which only measures.
      shape: leading axes, for the stacked parameters of a scan over layers.

    Returns:
      float32 `(*shape, 3)`. Store it among the parameters under the name `modulation_site`.

    Raises:
      ConfigError: the position is no finite number, or the shape no tuple of sizes.

    Example:
      >>> init_site(position=4).tolist(), init_site(shape=(36,)).shape
      ([0.0, 0.0, 4.0], (36, 3))
    """
    checks.number("position", position, traced=True)
    checks.fits("position", position, jnp.float32)
    shape = checks.shape("shape", shape)
    bounds = jnp.zeros((*shape, 2), jnp.float32)
    place = jnp.full((*shape, 1), position, jnp.float32)
    return jnp.concatenate([bounds, place], axis=-1)


def modulate(x: jax.Array, site: jax.Array) -> jax.Array:
    r"""A modulation site: the identity forward, :math:`\rho\,\delta` backward.

    Put it at the output of every parametric layer but the last, before the normalization:
    `y = modulate(conv(x), params["modulation_site"])`. Call it on a batch: the moment is a mean
    over the examples too. The gradient of `site` is what :func:`measurement` reads: the moment
    :math:`q` of the cotangent that arrived, and a weight of 1, both in units that no norm of
    gradients sees. It is meant for :func:`orthojax.modulation`, which sets the bounds. Without it
    the site is inert: another optimizer leaves it without an upper bound, and then it rescales
    nothing, as a fresh one.

    Sums and means of such gradients (a site used twice, `psum`, `pmean`, microbatches, a loss
    scale divided out) keep the quotient of moment and weight meaningful. In the body of a
    `pmap` or `shard_map` each device compares the moment of its own share of the batch.

    Args:
      x: activations, any floating dtype and shape.
      site: `(3,)` of :func:`init_site`.

    Returns:
      The same `x`.

    Raises:
      ConfigError: `x` is not floating, or `site` is not of the shape above and a dtype with the
        exponents of float32.

    Example:
      Behind a layer that shrinks the error ten times; the bounds are those of a net whose
      topmost error has a second moment of 1:

      >>> import jax, jax.numpy as jnp
      >>> site = jnp.asarray([1.0, 1.0, 0.0])
      >>> loss = lambda x, site: jnp.sum(0.1 * modulate(x, site))
      >>> error, measured = jax.grad(loss, argnums=(0, 1))(jnp.ones(3), site)
      >>> moment, weight = measurement(measured)
      >>> print(error, round(float(moment), 6), float(weight))
      [1. 1. 1.] 0.01 1.0
    """
    x, site = checks.array("x", x), checks.array("site", site)
    if site.shape != (3,) or site.dtype.name not in _SITE_DTYPES:
        raise ConfigError(
            f"modulate needs a site of shape (3,) in {' or '.join(_SITE_DTYPES)}, from "
            f"orthojax.init_site(); it is {site.dtype} {site.shape}. Stacked sites belong to a "
            "scan or vmap over layers, and float16 cannot hold a second moment"
        )
    return _site(x, vary_like(x, site))


@jax.custom_vjp
def _site(x, site):
    del site
    return x


def _site_forward(x, site):
    return x, site


def _site_backward(site, cotangent):
    moment = jnp.mean(jnp.square(cotangent.astype(jnp.float32)))
    rho, measured = rescaling(moment, site, cotangent.dtype)
    wide = accumulation_dtype(cotangent.dtype)
    return (rho.astype(wide) * cotangent.astype(wide)).astype(cotangent.dtype), measured


_site.defvjp(_site_forward, _site_backward)


def rescaling(moment: jax.Array, site: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    r"""What a site does in a backward pass, for layers that know the moment by other means.

    Args:
      moment: :math:`q`, second moment of the cotangent that arrives, a float32 scalar.
      site: `(3,)` of :func:`init_site`.
      dtype: of the cotangent.

    Returns:
      :math:`\rho`, float32, which the cotangent is to be multiplied with; and the gradient of the
      site, or zeros where the error vanished or overflowed and says nothing.

    Example:
      >>> rho, measured = rescaling(jnp.float32(4), jnp.asarray([1.0, 1.0, 0.0]), jnp.float32)
      >>> float(rho), *map(float, measurement(measured))  # the root of 1 / 4
      (0.5, 4.0, 1.0)
    """
    low, high = site[0].astype(jnp.float32), site[1].astype(jnp.float32)
    usable = (moment > 0) & jnp.isfinite(moment)
    ceiling = jnp.float32(float(jnp.finfo(dtype).max) ** (2 * _CEILING_EXPONENT))
    low, upper = jnp.where(high > 0, low, 0), jnp.where(high > 0, high, ceiling)
    outside = usable & ((moment < low) | (moment > upper))
    # A quotient of roots: that of the moments themselves might leave float32's exponents.
    root = jnp.sqrt(jnp.clip(moment, low, upper)) / jnp.sqrt(jnp.where(usable, moment, 1))
    rho = jnp.where(outside, root, 1)
    measured = jnp.stack([moment * _MOMENT, jnp.float32(_WEIGHT), jnp.float32(0)])
    return rho, jnp.where(usable, measured, 0).astype(site.dtype)


def measurement(gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the gradient of a site, or a sum or mean of such, says: `(..., 3)` to twice `(...)`.

    Returns:
      The second moment of the cotangents that arrived, 0 where none did or all overflowed; and how
      much they count: 1 a site and backward pass, times whatever the gradient was multiplied with.
      Both float32.

    Raises:
      ConfigError: `gradient` is no floating array `(..., 3)`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> loss = lambda site: jnp.sum(0.5 * modulate(modulate(jnp.ones(3), site), site))
      >>> [float(x) for x in measurement(jax.grad(loss)(init_site()))]
      [0.25, 2.0]
    """
    gradient = checks.array("gradient", gradient, 1)
    if gradient.shape[-1] != 3:
        raise checks.refuse("gradient", gradient, "that of a site, of shape (..., 3)")
    gradient = gradient.astype(jnp.float32)
    total, weight = gradient[..., 0] / _MOMENT, gradient[..., 1] / _WEIGHT
    return total / jnp.where(weight == 0, 1, weight), weight


def vary_like(x: jax.Array, tree: Any) -> Any:
    """Marks `tree` as varying over the manual mesh axes that `x` varies over (`jax.shard_map`).

    A `custom_vjp` must return cotangents that vary as their primals do; this makes the sum over
    devices the transpose of the mark.
    """

    def mark(leaf):
        axes = tuple(_varying(x) - _varying(leaf))
        return jax.lax.pcast(leaf, axes, to="varying") if axes else leaf

    return jax.tree.map(mark, tree)


def _varying(x):
    return jax.typeof(x).mat.varying


def is_site(path: tuple) -> bool:
    """Whether a leaf at this path of a tree of parameters is a site."""
    return any(jax.tree_util.keystr((key,), simple=True) == SITE for key in path)


def weights_only(tree: Any) -> Any:
    """The tree without its sites: `optax.MaskedNode` stands in their places.

    For norms and counts of parameters or gradients, of which the sites are no part.

    Example:
      >>> jax.tree.leaves(weights_only({"kernel": 1.0, "modulation_site": init_site()}))
      [1.0]
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: optax.MaskedNode() if is_site(path) else leaf, tree
    )
