"""Plain nets on CIFAR-10: the paper's protocol, and a preset that runs on two CPU cores.

The paper (section 5.1): 64k iterations of 128 images, SGD with momentum 0.9, learning rate 0.1
divided by 10 at 32k and 48k, coefficient 1e-4, horizontal flips only.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from orthojax.config import parse_arguments
from orthojax.isometry import isometric_bias

# The paper switches modulation off "after the first n iterations" and gives no n; its error
# profile (Fig. 4) settles after 2,000 to 3,000 of 64,000.
MODULATED_FRACTION = 2_500 / 64_000


def get_config(arguments: str | None = None) -> ConfigDict:
    """Arguments: depth, method, preset.

    depth (44): 6n + 2 layers.
    method: `ortho`, the paper's (orthonormal initialization and regularizer, modulation for the
      first n steps); `isometric`, this project's (delta-orthonormal kernels and a BN bias
      solved from the depth, modulation throughout); `l2`, the baseline (He initialization, L2, no
      modulation).
    preset: `full`; or `cpu`, images average-pooled to 16×16 and 600 steps.
    """
    args = parse_arguments(
        arguments, depth=44, method=("ortho", "isometric", "l2"), preset=("full", "cpu")
    )
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
                "kernel_init": "orthonormal",
                "bn_bias": 0.0,
                "scan": True,
                "remat": "none",
            },
            "modulation": {
                "decay": 0.9,
                "tolerance": 10.0,
                "steps": round(MODULATED_FRACTION * steps),
            },
            "regularizer": {"name": "ortho", "coefficient": 1e-4},
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
    if args.method == "isometric":
        config.model.kernel_init = "delta_orthonormal"
        config.model.bn_bias = round(isometric_bias(args.depth - 1), 2)
        with config.ignore_type():
            config.modulation.steps = None
        # The best rungs of a ladder in the cpu preset: 0.005 at 44 layers, 0.002 at 110.
        config.optimizer.learning_rate = round(0.22 / max(44, args.depth), 5)
    elif args.method == "l2":
        config.model.kernel_init = "he"
        config.modulation = None
        config.regularizer = {"name": "l2", "coefficient": 1e-4}
    return config
