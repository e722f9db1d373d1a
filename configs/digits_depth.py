"""1,004 plain layers on the UCI handwritten digits, or 10,004: as deep as one likes.

As `digits_plain110`, with less memory and more time: all but √n activations are computed again.
"""

from ml_collections import ConfigDict

from orthojax.config import parse_arguments
from orthojax.configs import digits_plain110


def get_config(arguments: str | None = None) -> ConfigDict:
    """Arguments: depth, steps.

    depth (1004): 6n + 2 layers.
    steps (300): number of updates.
    """
    args = parse_arguments(arguments, depth=1004, steps=300)
    config = digits_plain110.get_config(f"depth={args.depth},steps={args.steps}")
    config.model.remat = "segments"
    config.optimizer.learning_rate = 0.001 if args.depth < 3_000 else 0.0005
    config.checkpoint_every, config.keep_checkpoints = 10, 1  # of 10,004 layers one is 330 MB
    return config
