"""The compiled nets that several parts of the benchmark measure."""

import functools
import sys

import jax
import jax.numpy as jnp

from orthojax.configs import digits_plain110
from orthojax.configs.cifar10_plain import get_config
from orthojax.training.compiled import abstract_state, compile_steps, lower_train_step
from orthojax.training.experiment import build

BATCH = 128
SIZE = 32

BASELINE = "SGD + L2"
METHOD = "SGD + ortho + modulation"
OBSERVED = "SGD + L2, observed"
SOAP = "SOAP + L2"
OBSERVING = 1e30  # a tolerance that no error exceeds
VARIANTS = {  # name -> regularizer, tolerance of modulation
    BASELINE: ("l2", None),
    "SGD + ortho": ("ortho", None),
    "SGD + L2 + modulation": ("l2", 10.0),
    METHOD: ("ortho", 10.0),
    OBSERVED: ("l2", OBSERVING),
    SOAP: ("l2", None),
}


def experiment(variant, depth, **model):
    """A plain net on CIFAR-10 without its images; `model` overrides keys of that section."""
    regularizer, tolerance = VARIANTS[variant]
    config = get_config(f"depth={depth},method={'paper' if tolerance else 'baseline'}")
    if tolerance:
        config.modulation.tolerance = tolerance
    config.regularizer = {"name": regularizer, "coefficient": 1e-4}
    if variant == SOAP:
        with config.ignore_type():
            config.optimizer = {"name": "soap", "learning_rate": 1e-3, "rest": config.optimizer}
    config.mesh.data = 1
    config.model.update(model)
    return build(config, records=False)


@functools.cache
def programs(variant, depth, **model):
    """The same, compiled."""
    compiled = compile_steps(experiment(variant, depth, **model))
    details = ", ".join(f"{key}={value}" for key, value in model.items())
    print(
        f"plain-{depth}, {variant}{details and ', ' + details}: "
        f"compiled in {compiled.compile_seconds:.1f} s",
        file=sys.stderr,
    )
    return compiled


def lower_on_digits(depth, remat="none"):
    """The training step of `configs/digits_plain110.py` at a depth, ready to compile."""
    config = digits_plain110.get_config(f"depth={depth}")
    config.mesh.data = 1
    config.model.remat = remat
    made = build(config)
    return lower_train_step(made, abstract_state(made))


def constant_batch(compiled):
    """A batch of random images on the device."""
    image = jax.random.randint(jax.random.key(0), (BATCH, SIZE, SIZE, 3), 0, 256)
    label = jnp.arange(BATCH, dtype=jnp.int32) % 10
    return compiled.put({"image": image.astype(jnp.uint8), "label": label})


def make_step(compiled, next_batch=None, observe=None):
    """A function that makes one training step and waits for it, and for `observe` of the state."""
    state = [compiled.init()]
    if next_batch is None:
        batch = constant_batch(compiled)
        next_batch = lambda: batch  # noqa: E731

    def step():
        state[0], metrics = compiled.train_step(state[0], next_batch())
        jax.block_until_ready(metrics)
        if observe is not None:
            jax.device_get(observe(state[0].params, state[0].opt_state))

    return step


def call_repeatedly(times, function, *arguments):
    """Calls what is too short to be timed alone, and waits each time for the result."""
    for _ in range(times):
        jax.block_until_ready(function(*arguments))


def peak_memory(compiled) -> int:
    """Bytes of a compiled program's arguments, results and temporary buffers; aliases once."""
    sizes = compiled.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return held + sizes.temp_size_in_bytes
