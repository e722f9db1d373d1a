"""Plain nets on CIFAR-10: the paper's protocol, and a preset that runs on two CPU cores.

The paper (section 5.1): 64k iterations of 128 images, SGD with momentum 0.9, learning rate 0.1
divided by 10 at 32k and 48k, coefficient 1e-4, horizontal flips only.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from orthojax.config import parse_arguments
from orthojax.configs._methods import METHODS, set_method


def get_config(arguments: str | None = None) -> ConfigDict:
    """Arguments: depth, method, preset.

    depth (44): 6n + 2 layers.
    method: `near_isometric`, this project's (delta-orthonormal kernels and a BN bias solved from
      the depth, modulation throughout); `paper` (orthonormal kernels and regularizer, modulation
      for the first n steps); `baseline` (He initialization, L2, no modulation).
    preset: `full`; or `cpu`, images average-pooled to 16×16 and 600 steps.
    """
    args = parse_arguments(arguments, depth=44, method=METHODS, preset=("full", "cpu"))
    cpu = args.preset == "cpu"
    steps = 600 if cpu else 64_000
    config = ConfigDict(
        {
            "seed": 0,
            "steps": steps,
            "batch_size": 128,
            "clip_grad_norm": placeholder(float),  # None: does not clip
            "dtype": "float32",
            "dataset": {
                "name": "cifar10",
                "data_dir": placeholder(str),
                "downsample": 2 if cpu else 1,
                "flip": True,
            },
            "model": {
                "name": "PlainNet",
                "depth": args.depth,
                "width": 16,
                "scan": True,
                "remat": "none",
            },
            "optimizer": {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9},
            "schedule": {
                "name": "step_decay",
                "warmup_steps": 20 if cpu else 0,
                "boundaries": (0.5, 0.75),
                "factor": 0.1,
            },
            "log_every": 20 if cpu else 100,
            "eval_every": 100 if cpu else 1_000,
            "checkpoint_every": 100 if cpu else 1_000,
            "recalibrate_bn": 0,
            "keep_checkpoints": 3,
            "tensorboard": False,
            "mesh": {"data": -1, "fsdp": 1},
        }
    )
    set_method(config, args.method)
    if args.method == "near_isometric":
        # The best rungs of a ladder in the cpu preset: 0.005 at 44 layers, 0.002 at 110.
        config.optimizer.learning_rate = round(0.22 / max(44, args.depth), 5)
    return config
