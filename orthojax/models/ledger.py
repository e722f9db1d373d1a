r"""The growth ledger of a plain net: by what the error grows at every layer, and why.

The squared error of a Conv-BN-ReLU net, summed over elements, grows from the output of one
convolution down to that of the one below by a factor G. In units of the variance at each (a
kernel's scale is undone by its batch normalization, and so cancels) it splits into

.. math:: \ln G = \underbrace{\ln\frac{E[\gamma^2 \Phi(b)]}
          {E[\gamma^2\,\mathrm{Var}\,\mathrm{ReLU}(N(b, 1))]}}_{\text{bias term}}
          - \ln a + \text{rest}, \qquad
          a = \frac{\sum_j \sigma_j^2}{\|W\|_F^2} \cdot \frac{C}{\mathrm{tr\,Cov}(x)},

with :math:`b = \beta / \gamma` of the batch normalization in between, means over its C channels,
and the kernel W above it, whose input is x and whose outputs have variances :math:`\sigma_j^2`.
(Of W, a tap counts as often as it falls on the image and not on the padding.)

* The **bias term** is that of near-isometric initialization, `orthojax.isometry.error_growth`,
  where all channels are alike: 0.383 at b = 0, and less the larger b, or the more it differs.
* The **alignment** ln a says how far the kernel leans toward the leading components of its input:
  0 if it does not, up to ln C if it sees one of them alone. It lets the variance grow forward,
  which batch normalization divides by, and the error does not.
* The **rest** is what the two leave: correlations that they do not know of.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from orthojax.isometry import passed_share, relu_variance
from orthojax.models import PlainNet, unstack_blocks
from orthojax.models.growth import site_moments
from orthojax.sites import is_site, weights_only

#: Up to so many decades between two layers the nets of this project have been seen to learn.
LARGEST_DECADES = 5.0


class Entry(NamedTuple):
    """One layer of the ledger; natural logarithms.

    Attributes:
      path: of the convolution.
      growth: ln G, from the convolution above down to this one.
      bias_term: by the batch normalization of this layer.
      alignment: ln a, of the kernel above.
      rest: `growth - bias_term + alignment`.
    """

    path: str
    growth: float
    bias_term: float
    alignment: float
    rest: float


class Ledger(tuple):
    """The :class:`Entry` of every convolution but the topmost, from the images up; `print` it."""

    def total(self, column: str = "growth") -> float:
        """The sum of a column over the layers."""
        return sum(getattr(entry, column) for entry in self)

    def decades(self) -> float:
        """By how many powers of ten the squared error differs between any two layers, at most."""
        way_down = np.cumsum([0.0, *(entry.growth for entry in reversed(self))])
        return float(np.ptp(way_down) / np.log(10))

    def __str__(self) -> str:
        width = max(len("layer"), *(len(entry.path) for entry in self))
        names = Entry._fields[1:]
        lines = [f"{'layer':{width}}  " + "  ".join(f"{name:>9}" for name in names)]
        rows = [*self, Entry("sum", *(self.total(name) for name in names))]
        lines += [f"{row.path:{width}}  " + "  ".join(f"{v:9.3f}" for v in row[1:]) for row in rows]
        learns = "one" if self.decades() <= LARGEST_DECADES else "more than any"
        lines.append(
            f"{self.decades():.1f} decades between the layers that differ most: {learns} of those "
            f"that have been seen to learn, which is up to {LARGEST_DECADES:.0f}"
        )
        return "\n".join(lines)


def growth_ledger(
    net: PlainNet, variables: Mapping[str, Any], key: jax.Array, images: jax.Array
) -> Ledger:
    """Measures the ledger of a net, at initialization or at any time of its training.

    The net runs in training mode, and a random error enters at the logits. Unrolled, so that a net
    of 110 layers takes some ten seconds to compile.

    Args:
      net: plain, with sites or without.
      variables: `params`, with the sites if it has them, and `batch_stats`.
      key: of the error.
      images: float (N, H, W, C), normalized as in training. Some hundred, for the variances.

    Returns:
      The ledger; its last row is that of the convolution below the topmost one.

    Example:
      >>> net = PlainNet(depth=8, width=4, kernel_init="delta_orthonormal", bn_bias=1.0)
      >>> images = jax.random.normal(jax.random.key(1), (64, 8, 8, 1))
      >>> variables = net.init(jax.random.key(0), images, train=False)
      >>> ledger = growth_ledger(net, variables, jax.random.key(2), images)
      >>> len(ledger), abs(ledger.total()) < 3
      (6, True)
    """
    sited = net.clone(modulated=True, scan=False, remat="none")
    init = functools.partial(sited.init, train=False)
    fresh = jax.eval_shape(init, key, images[:1])["params"]
    weights = weights_only(unstack_blocks(variables["params"]))
    given = dict(jax.tree_util.tree_leaves_with_path(weights))
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.ones(leaf.shape) if is_site(path) else given[path], fresh
    )
    state = {"params": params, "batch_stats": unstack_blocks(variables["batch_stats"])}
    moments = jax.jit(lambda state: site_moments(sited, state, key, images))(state)
    layers = _layers(sited, state, images)
    unit = np.array([layer["variances"].mean() * layer["size"] for layer in layers], np.float64)
    growth = np.log(np.asarray(moments[:-1], np.float64) * unit[:-1] / unit[1:])
    entries = []
    for value, layer, above in zip(growth, layers, layers[1:], strict=False):
        bias = bias_term(layer["scale"], layer["bias"])
        kernel = above["kernel"] * np.sqrt(above["coverage"])
        ln_a = alignment(kernel, above["input_variances"], above["variances"])
        entries.append(Entry(layer["path"], float(value), bias, ln_a, float(value) - bias + ln_a))
    return Ledger(entries)


def bias_term(scale: np.ndarray, bias: np.ndarray) -> float:
    r"""The bias term of a batch normalization followed by ReLU.

    Args:
      scale: :math:`\gamma`, (C,), not all 0.
      bias: :math:`\beta`, (C,).

    Example:
      >>> round(bias_term(np.ones(4), np.zeros(4)), 3)  # ln(π / (π - 1))
      0.383
    """
    scale, bias = np.asarray(scale, np.float64), np.asarray(bias, np.float64)
    live = scale != 0  # a channel without scale passes no error and has no variance
    squares = scale[live] ** 2
    # The ReLU cuts the same share of the normal distribution whatever the sign of its scale.
    ratios = bias[live] / np.abs(scale[live])
    passed = np.array([passed_share(b) for b in ratios])
    variances = np.array([relu_variance(b) for b in ratios])
    return float(np.log((squares * passed).sum() / (squares * variances).sum()))


def alignment(
    kernel: np.ndarray, input_variances: np.ndarray, output_variances: np.ndarray
) -> float:
    """ln a of a kernel.

    Args:
      kernel: (H, W, C, M).
      input_variances: (C,), of what it is applied to.
      output_variances: (M,), of what comes out.

    Example:
      >>> alignment(np.ones((1, 1, 2, 1)), np.ones(2), 4 * np.ones(1)) == float(np.log(2))
      True
    """
    square = np.square(kernel, dtype=np.float64).sum()
    isotropic = square * np.mean(input_variances, dtype=np.float64)
    return float(np.log(np.sum(output_variances, dtype=np.float64) / isotropic))


def _layers(net: PlainNet, state: Mapping[str, Any], images: jax.Array) -> list[dict[str, Any]]:
    """What the formulas need of every convolution, in the order of the calls."""

    def forward(state):
        layers = []

        def spy(call, args, kwargs, context):
            out = call(*args, **kwargs)
            if isinstance(context.module, nn.Conv) and context.method_name == "__call__":
                norm = state["params"]
                for name in context.module.path[:-1]:
                    norm = norm[name]
                layers.append(
                    {
                        "input_variances": args[0].var((0, 1, 2), dtype=jnp.float32),
                        "variances": out.var((0, 1, 2), dtype=jnp.float32),
                        "size": jnp.float32(out.size),
                        "kernel": norm["conv"]["kernel"],
                        "coverage": _coverage(args[0].shape[1:3], out.shape[1:3], context.module),
                        "scale": norm["bn"]["scale"],
                        "bias": norm["bn"]["bias"],
                    }
                )
                paths.append("/".join(context.module.path))
            return out

        with nn.intercept_methods(spy):
            net.apply(state, images, train=True, mutable=["batch_stats"])
        return layers

    paths: list[str] = []
    found = jax.device_get(jax.jit(forward)(state))
    return [{"path": path, **layer} for path, layer in zip(paths, found, strict=True)]


def _coverage(inputs: tuple[int, ...], outputs: tuple[int, ...], conv: nn.Conv) -> np.ndarray:
    """How large a share of the outputs every tap finds a pixel for: (H, W, 1, 1)."""
    shares = []
    strides = np.broadcast_to(conv.strides or 1, 2)
    for size, out, taps, stride in zip(inputs, outputs, conv.kernel_size, strides, strict=True):
        before = max((out - 1) * stride + taps - size, 0) // 2  # of "SAME" padding
        pixel = stride * np.arange(out)[:, None] + np.arange(taps) - before
        shares.append(((pixel >= 0) & (pixel < size)).mean(0, dtype=np.float32))
    return (shares[0][:, None] * shares[1])[..., None, None]
