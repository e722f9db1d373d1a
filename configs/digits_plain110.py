"""A 110-layer plain net on the UCI handwritten digits, by orthonormality and modulation."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from orthojax.config import parse_arguments
from orthojax.configs._methods import METHODS, set_method


def get_config(arguments: str | None = None) -> ConfigDict:
    """Arguments: depth, method, steps.

    depth (110): 6n + 2 layers.
    method: `near_isometric`, this project's (delta-orthonormal kernels and a BN bias solved from
      the depth, modulation throughout); `paper` (orthonormal kernels and regularizer, modulation
      for the first n steps); `baseline` (He initialization, L2, no modulation).
    steps (300): number of updates.
    """
    args = parse_arguments(arguments, depth=110, method=METHODS, steps=300)
    config = ConfigDict(
        {
            "seed": 0,
            "steps": args.steps,
            "batch_size": 128,
            "clip_grad_norm": placeholder(float),  # None: does not clip
            "dtype": "float32",
            "dataset": {"name": "digits", "data_dir": placeholder(str), "flip": False},
            "model": {
                "name": "PlainNet",
                "depth": args.depth,
                "width": 8,
                "scan": True,
                "remat": "none",
            },
            "optimizer": {"name": "sgd", "learning_rate": 0.005, "momentum": 0.9},
            "schedule": {
                "name": "step_decay",
                "warmup_steps": min(20, args.steps),
                "boundaries": (0.5, 0.75),
                "factor": 0.1,
            },
            "log_every": 10,
            "eval_every": 50,
            "checkpoint_every": 50,
            "recalibrate_bn": 0,
            "keep_checkpoints": 3,
            "tensorboard": False,
            "mesh": {"data": -1, "fsdp": 1},
        }
    )
    set_method(config, args.method)
    return config
