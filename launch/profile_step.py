"""Prints which instructions of a config's training step take how long, on this machine.

python launch/profile_step.py --config=configs/cifar10_plain.py:depth=44 --top=30

The images are noise, so no data set is needed.
"""

import sys

from absl import flags

from orthojax.commands.command_line import run
from orthojax.commands.config_flag import define_config, load_config
from orthojax.console import tell


def define_flags():
    define_config()
    flags.DEFINE_integer("top", 30, "How many instructions to print.", lower_bound=1)


def main():
    import jax
    import numpy as np

    from orthojax.benchmarks.profile import profile
    from orthojax.training.compiled import compile_steps
    from orthojax.training.experiment import build

    experiment = build(load_config(), records=False)
    tell("compiling...")
    programs = compile_steps(experiment)
    draw, rows = np.random.default_rng(0), len(programs.rows)
    images = draw.integers(0, 256, (rows, *experiment.dataset.image_shape), np.uint8)
    labels = draw.integers(0, experiment.dataset.num_classes, rows, np.int32)
    batch = programs.put({"image": images, "label": labels})
    state = [programs.init()]

    def step():
        state[0], metrics = programs.train_step(state[0], batch)
        jax.block_until_ready(metrics)

    shares = profile(step, programs.compiled_train_step.as_text())
    lines = [f"{'ms/step':>9} {'times':>6}  instruction, result, origin"]
    lines += [
        f"{share.milliseconds:9.3f} {share.count:6.0f}  {share.name}  {share.shape}  {share.origin}"
        for share in shares[: flags.FLAGS.top]
    ]
    tell("\n".join(lines), sys.stdout)


if __name__ == "__main__":
    run(define_flags, main)
