"""Inference of plain nets against their residual twins, batch normalization folded in both."""

import functools

import jax
import numpy as np

from orthojax.benchmarks.measurements import measurement, ratio
from orthojax.benchmarks.programs import call_repeatedly
from orthojax.benchmarks.timing import time_interleaved
from orthojax.inference.folding import FoldedNet, fold_batch_norm
from orthojax.models import PlainNet, ResNet

DEPTHS = (20, 44, 110)
BATCHES = {1: 20, 128: 1}  # images at once -> calls that are timed together


def measure(rounds: int, depth: int, clock):
    """Measures latency at three depths, whatever the depth of the other parts."""
    del depth
    steps, found = {}, []
    for layers in DEPTHS:
        for kind in (PlainNet, ResNet):
            steps |= {(layers, kind, *key): step for key, step in _steps(kind, layers).items()}
    seconds = time_interleaved(steps, rounds, clock)
    for layers in DEPTHS:
        for batch, calls in BATCHES.items():
            plain, residual = (
                [1e3 * s / calls for s in seconds[layers, kind, batch, True]]
                for kind in (PlainNet, ResNet)
            )
            whole = [1e3 * s / calls for s in seconds[layers, PlainNet, batch, False]]
            name = f"{layers} layers, batch {batch}"
            found += [
                measurement(f"latency of a folded plain net, {name}", plain, unit="ms"),
                ratio(f"latency, plain / residual, both folded, {name}", plain, residual),
                ratio(f"latency, plain folded / not folded, {name}", plain, whole),
            ]
    return found


def _steps(kind, layers):
    """(batch, folded) -> a call; of a residual net the folded ones alone."""
    net = kind(depth=layers, width=16, scan=False)
    variables = net.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32), train=False)
    forms = {True: (FoldedNet(net), fold_batch_norm(variables))}
    if kind is PlainNet:
        forms[False] = net, variables
    found = {}
    for folded, (model, weights) in forms.items():
        apply = jax.jit(lambda x, m=model, w=weights: m.apply(w, x, train=False))
        for batch, calls in BATCHES.items():
            images = np.zeros((batch, 32, 32, 3), np.float32)
            compiled = apply.lower(images).compile()
            found[batch, folded] = functools.partial(call_repeatedly, calls, compiled, images)
    return found
