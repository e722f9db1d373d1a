"""A 110-layer plain net on the UCI handwritten digits, by orthonormality and modulation."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from orthojax.config import parse_arguments
from orthojax.isometry import isometric_bias


def get_config(arguments: str | None = None) -> ConfigDict:
    """`depth` (110): 6n + 2 layers; `steps` (300): number of updates."""
    args = parse_arguments(arguments, depth=110, steps=300)
    return ConfigDict(
        {
            "seed": 0,
            "steps": args.steps,
            "batch_size": 128,
            "dtype": "float32",
            "dataset": {"name": "digits", "data_dir": placeholder(str), "flip": False},
            "model": {
                "name": "PlainNet",
                "depth": args.depth,
                "width": 8,
                "kernel_init": "delta_orthonormal",
                "bn_bias": round(isometric_bias(args.depth - 1), 2),
                "scan": True,
                "remat": "none",
            },
            "modulation": {
                "mode": "running",
                "decay": 0.9,
                "tolerance": 0.1,
                "max_scale": 10.0,
                "steps": placeholder(float),  # None: always
                "settle": 0.0,
            },
            "regularizer": {"name": "ortho", "coefficient": 1e-4},
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
            "keep_checkpoints": 3,
            "tensorboard": False,
            "mesh": {"data": -1, "fsdp": 1},
        }
    )
