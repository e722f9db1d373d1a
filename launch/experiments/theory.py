"""Growth of the error at initialization: measured, against the theory, for depths up to 1,004."""

import functools
import math

import jax
import jax.numpy as jnp

from orthojax.experiments.report import table, write_report
from orthojax.isometry import error_growth
from orthojax.models import PlainNet
from orthojax.models.growth import log_growth
from orthojax.pictures.picture import COLORS, clear_frame, new_picture

TITLE = "Growth of the squared error per layer at initialization"
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
    for depth, width in SHAPES[options.preset]:
        for kernel in KERNELS:
            net = PlainNet(depth=depth, width=width, kernel_init=kernel)
            grow = jax.jit(functools.partial(_per_layer, net, images))
            for bias in BIASES:
                keys = [jax.random.key(seed) for seed in options.seeds]
                measured[depth, kernel, bias] = [float(grow(key, bias)) for key in keys]
    shapes = ", ".join(f"{depth} of width {width}" for depth, width in SHAPES[options.preset])
    write_report(
        options,
        TITLE,
        table(
            ["bias", "theory", *(f"{d}, {k.split('_')[0]}" for d, k, b in measured if b == 0)],
            [
                [
                    f"{bias:g}",
                    f"{error_growth(bias):.4f}",
                    *(
                        f"{math.exp(sum(v) / len(v)):.4f}"
                        for (_, _, b), v in measured.items()
                        if b == bias
                    ),
                ]
                for bias in BIASES
            ],
        ),
        f"Layers: {shapes}; batch 128 of 8×8 noise. `delta`: delta-orthonormal kernels, but for "
        "the three that change the number of channels; `orthonormal`: Gram-Schmidt. The theory "
        "holds for isometric kernels, wide nets and large batches; the first layer, where the "
        "growth is Φ(β), and padding at strides weigh the more the shallower the net is.",
        pictures={"theory": _draw(options, measured)},
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


def _draw(options, measured):
    picture = new_picture(9, 3.8)
    fine = [3 * i / 100 for i in range(101)]
    for axes, kernel in zip(picture.subplots(1, 2), KERNELS, strict=True):
        axes.plot(fine, [error_growth(bias) for bias in fine], color="black", label="theory")
        for color, (depth, _) in zip(COLORS, SHAPES[options.preset], strict=False):
            for seed in range(len(options.seeds)):
                values = [math.exp(measured[depth, kernel, bias][seed]) for bias in BIASES]
                label = f"{depth} layers" if seed == 0 else None
                axes.plot(BIASES, values, "o", color=color, markersize=4, label=label)
        axes.axhline(1, color="gray", linewidth=0.5)
        axes.set(title=kernel, xlabel="BN bias β", ylabel="growth per layer")
        clear_frame(axes)
        axes.legend(frameon=False, fontsize=8)
    return picture
