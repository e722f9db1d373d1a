"""Single convolutions of the nets, forward and both gradients, against XLA's outside a loop."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from orthojax.benchmarks.measurements import measurement, ratio
from orthojax.benchmarks.programs import BATCH, call_repeatedly
from orthojax.benchmarks.timing import time_interleaved
from orthojax.models.convolution import conv_general_dilated

# Size of the images, channels in and out, stride: of CIFAR-10 at width 16, the digits at width 8.
SHAPES = (
    *((32, 16, 16, 1), (16, 32, 32, 1), (8, 64, 64, 1), (32, 16, 32, 2)),
    *((8, 8, 8, 1), (4, 16, 16, 1), (2, 32, 32, 1)),
)
CONVOLUTIONS = {"ours": conv_general_dilated, "XLA": lax.conv_general_dilated}
CALLS = 10  # that are timed together


def measure(rounds: int, depth: int, clock):
    """Measures the shapes of above, whatever the depth of the other parts."""
    del depth
    steps = {}
    for shape in SHAPES:
        for name, convolve in CONVOLUTIONS.items():
            steps |= {(shape, name, kind): step for kind, step in _steps(convolve, *shape).items()}
    seconds = time_interleaved(steps, rounds, clock)
    found = []
    for shape in SHAPES:
        size, channels, features, stride = shape
        for kind in ("forward", "input gradient", "kernel gradient"):
            name = f"{kind}, {size}×{size}, {channels} to {features}, stride {stride}"
            ours, xla = ([1e3 * s / CALLS for s in seconds[shape, n, kind]] for n in CONVOLUTIONS)
            found += [
                measurement(f"convolution, {name}", ours, unit="ms"),
                ratio(f"convolution, ours / XLA, {name}", ours, xla),
            ]
    return found


def _steps(convolve, size, channels, features, stride):
    """What to compute -> a call."""
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (BATCH, size, size, channels))
    kernel = jax.random.normal(keys[1], (3, 3, channels, features))
    run = functools.partial(
        convolve,
        window_strides=(stride, stride),
        padding="SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    error = jnp.ones(jax.eval_shape(run, x, kernel).shape)
    functions = {
        "forward": run,
        "input gradient": lambda x, kernel: jax.vjp(lambda x: run(x, kernel), x)[1](error)[0],
        "kernel gradient": lambda x, kernel: jax.vjp(lambda k: run(x, k), kernel)[1](error)[0],
    }
    return {
        kind: functools.partial(
            call_repeatedly, CALLS, jax.jit(function).lower(x, kernel).compile(), x, kernel
        )
        for kind, function in functions.items()
    }
