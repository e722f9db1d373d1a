"""A 110-layer plain net on the UCI handwritten digits, by orthonormality and modulation."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from orthojax.config import parse_arguments
from orthojax.isometry import isometric_bias


def get_config(arguments: str | None = None) -> ConfigDict:
    """Arguments: depth, method, steps.

    depth (110): 6n + 2 layers.
    method: `isometric`, this project's (delta-orthonormal kernels and a BN bias solved from the
      depth), or `ortho`, the paper's start (Gram-Schmidt kernels and no bias), which modulation
      alone gets to learn, in ten times as many steps.
    steps: number of updates; 300, or 3,000 with `ortho`.
    """
    args = parse_arguments(arguments, depth=110, method=("isometric", "ortho"), steps=0)
    ortho = args.method == "ortho"
    steps = args.steps or (3_000 if ortho else 300)
    config = ConfigDict(
        {
            "seed": 0,
            "steps": steps,
            "batch_size": 128,
            "clip_grad_norm": placeholder(float),  # None: does not clip
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
                "decay": 0.9,
                "tolerance": 10.0,
                "steps": placeholder(float),  # None: always
            },
            "regularizer": {"name": "ortho", "coefficient": 1e-4},
            "optimizer": {"name": "sgd", "learning_rate": 0.005, "momentum": 0.9},
            "schedule": {
                "name": "step_decay",
                "warmup_steps": min(20, steps),
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
    if ortho:
        config.model.kernel_init, config.model.bn_bias = "orthonormal", 0.0
        config.optimizer.learning_rate = 0.06
        config.schedule = {"name": "linear", "warmup_steps": min(20, steps)}
        config.recalibrate_bn = 1_280
        config.clip_grad_norm = 1.0  # a burst of the error does not undo what has been learned
        config.log_every, config.eval_every, config.checkpoint_every = 50, 250, 250
    return config
