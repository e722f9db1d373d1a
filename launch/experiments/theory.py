"""Growth of the squared error per layer at initialization: measured, against the theory.

Batches of 128 images of 8×8 noise. `delta`: delta-orthonormal kernels, but for the three that
change the number of channels; `orthonormal`: Gram-Schmidt. The theory holds for isometric kernels,
wide nets and large batches; the first layer, where the growth is Φ(β), and padding at strides weigh
the more the shallower the net is.
"""

import functools
import itertools
import math
import statistics

import jax
import jax.numpy as jnp

from orthojax.experiments.report import POINTS, Line, draw, table, write_report
from orthojax.isometry import error_growth
from orthojax.models import PlainNet
from orthojax.models.growth import log_growth

BIASES = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
KERNELS = ("delta_orthonormal", "orthonormal")
SHAPES = {"cpu": ((44, 16), (110, 16), (302, 8), (1004, 8)), "full": ((110, 64), (1004, 64))}


def jobs(options):
    """Nothing is trained."""
    del options
    return {}


def report(options, results):
    """Per layer, the geometric mean over the net, against the bias."""
    del results
    images = jax.random.normal(jax.random.key(100), (128, 8, 8, 3))
    measured = {}
    for (depth, width), kernel in itertools.product(SHAPES[options.preset], KERNELS):
        net = PlainNet(depth=depth, width=width, kernel_init=kernel)
        grow = jax.jit(functools.partial(_per_layer, net, images))
        for bias in BIASES:
            keys = [jax.random.key(seed) for seed in options.seeds]
            measured[depth, kernel, bias] = [float(grow(key, bias)) for key in keys]
    nets = list(itertools.product(SHAPES[options.preset], KERNELS))
    rows = [
        [
            f"{bias:g}",
            f"{error_growth(bias):.4f}",
            *(f"{math.exp(statistics.fmean(measured[d, k, bias])):.4f}" for (d, _), k in nets),
        ]
        for bias in BIASES
    ]
    headings = [f"{d} of width {width}, {k.split('_')[0]}" for (d, width), k in nets]
    write_report(
        options,
        __doc__,
        table(["bias", "theory", *headings], rows),
        pictures={"theory": draw(*(_panel(measured, kernel) for kernel in KERNELS))},
        records=[
            {"depth": depth, "kernel": kernel, "bias": bias, "seed": seed, "log_growth": value}
            for (depth, kernel, bias), values in measured.items()
            for seed, value in zip(options.seeds, values, strict=True)
        ],
    )


def _per_layer(net, images, key, bias):
    """Mean log growth of the norm; the bias is a constant initializer's, so it can be traced."""
    growth = log_growth(net.clone(bn_bias=bias), key, images)
    # The second moment is a mean over elements, of which there are four times as many below.
    return (jnp.sum(growth) + math.log(4)) / growth.size


def _panel(measured, kernel):
    """For `draw`: a line for the theory, a dot for every depth, bias and seed."""
    fine = [3 * i / 100 for i in range(101)]
    lines = [Line("theory", fine, [error_growth(bias) for bias in fine], {"color": "black"})]
    for (depth, name, bias), values in measured.items():
        if name == kernel:
            growth = [math.exp(value) for value in values]
            lines.append(Line(f"{depth} layers", [bias] * len(values), growth, POINTS))
    return lines, {"title": kernel, "xlabel": "BN bias β", "ylabel": "growth per layer"}
