"""What both sides of the comparison of orthogonal optimization share: the problem, and a protocol.

A worker is a process that holds one library. It reads requests, one JSON object per line, from its
standard input and answers each with one line, so that workers can be measured in turn: the one that
is not asked does nothing. This module needs NumPy alone, because PyTorch may live in an interpreter
of its own.

Requests are `{"versions": true}`, and `{"method", "shape", "rate"}` with either `"steps"`, how many
are timed, or `"seconds"`, how long to descend from the start.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np


@functools.cache
def problem(shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, float]:
    """Procrustes: minimize `Σ ‖W − T‖² / 2` over `(count, rows, columns)` orthonormal columns.

    Returns:
      The start and the target, float32, and the minimum. Targets are Gaussian, of mean column norm
      one; starts are random, with the determinant's sign of the solution where they are square.
    """
    rng = np.random.default_rng(0)
    count, rows, columns = shape
    target = rng.normal(size=shape) / rows**0.5
    start, _ = np.linalg.qr(rng.normal(size=shape))
    left, singular, right = np.linalg.svd(target, full_matrices=False)
    if rows == columns:
        wrong = np.linalg.det(start) * np.linalg.det(left @ right) < 0
        start[wrong, :, 0] *= -1
    minimum = (np.sum(target**2) + count * columns) / 2 - np.sum(singular)
    return start.astype(np.float32), target.astype(np.float32), float(minimum)


def serve(make: Callable, versions: dict[str, str]) -> None:
    """Answers requests until the input ends.

    Args:
      make: Of a method, start, target and learning rate; returns a function that takes one step,
        another that waits for all and returns the matrices.
      versions: Of the libraries.
    """
    # Answers alone go to the parent; what a library prints goes where errors go.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    made: dict = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "versions" in request:
            answer = versions
        elif "steps" in request:
            answer = _timed(made, make, request)
        else:
            answer = _descended(make, request)
        print(json.dumps(answer), file=answers, flush=True)


def _timed(made, make, request):
    start, target, _ = problem(tuple(request["shape"]))
    key = request["method"], start.shape, request["rate"]
    if key not in made:
        made[key] = make(request["method"], start, target, request["rate"])
    began = time.perf_counter()
    matrices = _advance(*made[key], request["steps"])
    seconds = (time.perf_counter() - began) / request["steps"]
    return {"seconds": seconds, "error": _error(matrices)}


def _descended(make, request):
    start, target, minimum = problem(tuple(request["shape"]))
    step, wait = make(request["method"], start, target, request["rate"])
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < request["seconds"]:
        matrices = _advance(step, wait, 1)
        steps += 1

    def objective(w):
        return float(np.sum((w.astype(np.float64) - target) ** 2)) / 2

    gap = (objective(np.asarray(matrices)) - minimum) / (objective(start) - minimum)
    return {"steps": steps, "error": _error(matrices), "gap": gap if np.isfinite(gap) else None}


def _error(matrices):
    """The largest `‖WᵀW − I‖_F / √n`; a large number instead of NaN, which JSON has not."""
    matrices = np.asarray(matrices, np.float64)
    gram = np.swapaxes(matrices, 1, 2) @ matrices
    excess = np.linalg.norm(gram - np.eye(gram.shape[-1]), axis=(1, 2)) / gram.shape[-1] ** 0.5
    return float(np.nan_to_num(excess, nan=1e30, posinf=1e30).max())


def _advance(step, wait, steps):
    for _ in range(steps):
        step()
    return wait()


def restrict(arguments: Sequence[str]) -> int:
    """Keeps this process on the cores that its command line names; returns their number."""
    cores = [int(core) for core in arguments]
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    return len(cores)
