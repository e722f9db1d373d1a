"""What an accelerator is asked for, in the order of its worth: steps of plain nets in all forms."""

import contextlib
import dataclasses
import functools
import importlib.util
import re
import statistics
import time
from collections.abc import Callable

import jax

from orthojax.benchmarks.programs import (
    BASELINE,
    METHOD,
    SOAP,
    constant_batch,
    experiment,
    peak_memory,
)
from orthojax.training.compiled import compile_steps, uncompiled_step

# -> compute dtype, precision of products. "float32" is not left to the device, which may take TF32.
PRECISIONS = {
    "float32": ("float32", "highest"),
    "tf32": ("float32", "default"),
    "bfloat16": ("bfloat16", "default"),
}
FORMS = {
    "scanned": {},
    "unrolled by 4": {"unroll": 4},
    "unrolled": {"scan": False},
}
PYTORCH = {"PyTorch": False, "torch.compile": True, "torch.compile, max-autotune": "max-autotune"}
ROUNDS, ROUND_SECONDS = 9, 0.2


@dataclasses.dataclass(frozen=True)
class Step:
    """One figure: a training step of a plain net.

    Attributes:
      depth: layers.
      width: channels of the first stage.
      batch: images.
      precision: of `PRECISIONS`.
      form: of `FORMS` or `PYTORCH`.
      variant: of `orthojax.benchmarks.programs.VARIANTS`.
      nets: how many are trained by one program, `jax.vmap` over them.
      steps: how many are taken by one program, without the host.
    """

    depth: int = 110
    width: int = 16
    batch: int = 128
    precision: str = "float32"
    form: str = "scanned"
    variant: str = BASELINE
    nets: int = 1
    steps: int = 1

    def __str__(self) -> str:
        told = [f"plain-{self.depth}", f"width {self.width}", f"batch {self.batch}"]
        told += [self.precision, self.form]
        told += [self.variant] if self.form in FORMS else []
        told += [f"{self.nets} nets at once"] if self.nets > 1 else []
        told += [f"{self.steps} steps a call"] if self.steps > 1 else []
        return ", ".join(told)


def plan(depths=(110, 44), widths=(16, 64), batches=(128, 1_024)) -> list[Step]:
    """What is to be measured, most important first: every question at one net, then the others."""
    first = Step(depths[0], widths[0], batches[0])
    change = dataclasses.replace
    found = [
        first,
        change(first, variant=METHOD),
        *(change(first, form=form) for form in ("unrolled by 4", "unrolled")),
        change(first, steps=10),
        *(change(first, form=form) for form in PYTORCH),
        *(change(first, precision=precision) for precision in ("tf32", "bfloat16")),
        change(first, nets=8),
        change(first, variant=SOAP),
    ]
    sizes = [(depths[0], widths[-1], batches[0]), (depths[0], widths[0], batches[-1])]
    sizes += [(d, w, b) for d in depths for w in widths for b in batches]
    for depth, width, batch in sizes:
        size = change(first, depth=depth, width=width, batch=batch)
        for precision in ("tf32", "bfloat16", "float32"):
            found += [change(size, precision=precision, form=form) for form in FORMS]
            found += [change(size, precision=precision, form=form) for form in PYTORCH]
        found += [change(size, variant=variant) for variant in (METHOD, SOAP)]
        found.append(change(size, nets=8))
    return list(dict.fromkeys(found))


def measure(step: Step) -> dict:
    """Seconds of a step, what compiling took, memory and kernels; by wall clock.

    Returns:
      `step_seconds`, the median of rounds, and its quartiles; `images_per_second`;
      `compile_seconds`; and of programs of this project `memory_bytes` and `kernels`, how many
      fusions, products and custom calls the compiled text has (a loop's body counts once). None
      where PyTorch is not installed.
    """
    if step.form in PYTORCH:
        if importlib.util.find_spec("torch") is None:
            return {"left_out": "PyTorch is not installed"}
        started = time.monotonic()
        call, wait, about = _pytorch(step)
        wait(call())
        about = {**about, "compile_seconds": time.monotonic() - started}
    else:
        call, wait, about = _ours(step)
        wait(call())
    seconds = [value / step.steps for value in _timed(call, wait)]
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    images = step.batch * step.nets / median
    spread = {"step_seconds": median, "lower": lower, "upper": upper}
    return {**spread, "images_per_second": images, **about}


def _timed(call: Callable, wait: Callable) -> list[float]:
    """Seconds of a call, for each round; calls follow each other as in training, unwaited for."""
    start = time.perf_counter()
    wait(call())
    once = time.perf_counter() - start
    count = max(1, round(ROUND_SECONDS / once))
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(count):
            result = call()
        wait(result)
        seconds.append((time.perf_counter() - start) / count)
    return seconds


def _ours(step: Step):
    dtype, precision = PRECISIONS[step.precision]
    with jax.default_matmul_precision(precision):
        made = experiment(
            step.variant,
            step.depth,
            batch=step.batch,
            dtype=dtype,
            width=step.width,
            **FORMS[step.form],
        )
        programs = compile_steps(made)
    batch = constant_batch(programs, step.batch)
    state = [programs.init()]
    compiled, seconds = programs.compiled_train_step, programs.compile_seconds
    if step.nets == step.steps == 1:

        def call():
            state[0], metrics = programs.train_step(state[0], batch)
            return metrics

    else:
        with jax.default_matmul_precision(precision):
            start = time.monotonic()
            compiled, state[0] = _several(step, made, programs, state[0], batch)
            seconds = time.monotonic() - start

        def call():
            state[0], metrics = compiled(state[0], batch)
            return metrics

    kernels = len(re.findall(r" (?:fusion|custom-call|convolution|dot)\(", compiled.as_text()))
    about = {"compile_seconds": seconds, "memory_bytes": peak_memory(compiled), "kernels": kernels}
    return call, jax.block_until_ready, about


def _several(step: Step, made, programs, state, batch):
    """One program of several nets, on the same batch, or of several steps; and its first state."""
    one = functools.partial(uncompiled_step(made), hyperparams=programs.hyperparams)
    if step.nets > 1:
        one = jax.vmap(one, in_axes=(0, None))
        state = jax.tree.map(lambda leaf: jax.numpy.stack([leaf] * step.nets), state)

    def program(state, batch):
        def turn(state, _):
            return one(state, batch)

        state, metrics = jax.lax.scan(turn, state, length=step.steps)
        return state, jax.tree.map(lambda leaf: leaf[-1], metrics)

    compiled = jax.jit(program, donate_argnums=0).lower(state, batch).compile()
    return compiled, state


def _pytorch(step: Step):
    import torch

    from orthojax.benchmarks import torch_plain

    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = torch_plain.make_step(
        step.depth,
        step.batch,
        channels_last=True,
        compiled=PYTORCH[step.form],
        width=step.width,
        device=device,
        dtype=step.precision,
        wait=False,
    )

    def wait(_):
        with contextlib.suppress(AssertionError):
            torch.cuda.synchronize()

    return call, wait, {}
