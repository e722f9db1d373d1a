"""The paper's start on the UCI handwritten digits, modulated throughout, ten times as long."""

from ml_collections import ConfigDict

from orthojax.config import parse_arguments
from orthojax.configs import digits_plain110


def get_config(arguments: str | None = None) -> ConfigDict:
    """Arguments: depth, steps.

    depth (110): 6n + 2 layers.
    steps (3000): number of updates.
    """
    args = parse_arguments(arguments, depth=110, steps=3_000)
    config = digits_plain110.get_config(f"depth={args.depth},method=paper,steps={args.steps}")
    with config.ignore_type():
        config.modulation.steps = None  # always
    config.optimizer.learning_rate = 0.06
    config.schedule = {"name": "linear", "warmup_steps": min(20, args.steps)}
    config.recalibrate_bn = 1_280
    config.clip_grad_norm = 1.0  # a burst of the error does not undo what has been learned
    config.log_every, config.eval_every, config.checkpoint_every = 50, 250, 250
    return config
