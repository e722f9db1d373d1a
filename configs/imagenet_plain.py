"""Plain nets on ImageNet: the paper's protocol, and a preset to try the machinery with.

The paper (section 5.1): batches of 256, 224×224 crops of 256×256 images, and the hyperparameters of
the CIFAR-10 protocol: SGD with momentum 0.9, learning rate 0.1 divided by 10 at half and at three
quarters of the run, coefficient 1e-4. It does not say how long a run is; `epochs` does here, and
120 are the 600,000 iterations of He et al. (2016), whose hyperparameters those are.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from orthojax.config import parse_arguments
from orthojax.configs._methods import METHODS, set_method

TRAINING_IMAGES = 1_281_167
BATCH_SIZE = 256


def get_config(arguments: str | None = None) -> ConfigDict:
    """Arguments: depth, method, epochs, preset.

    depth (34): 34 or 101.
    method: `near_isometric`, this project's (delta-orthonormal kernels and a BN bias solved from
      the depth, modulation throughout); `paper` (orthonormal kernels and regularizer, modulation
      for the first n steps); `baseline` (He initialization, L2, no modulation).
    epochs (120): of the whole data set.
    preset: `full`; or `mini`, width 8, 64×64 crops, batches of 20 and 75 steps, float32: five
      epochs of a set of 300 images.
    """
    args = parse_arguments(
        arguments,
        depth=34,
        method=METHODS,
        epochs=120,
        preset=("full", "mini"),
    )
    mini = args.preset == "mini"
    batch_size = 20 if mini else BATCH_SIZE
    epoch = 15 if mini else TRAINING_IMAGES // BATCH_SIZE
    steps = 5 * epoch if mini else args.epochs * TRAINING_IMAGES // BATCH_SIZE
    config = ConfigDict(
        {
            "seed": 0,
            "steps": steps,
            "batch_size": batch_size,
            "dtype": "float32" if mini else "bfloat16",
            "dataset": {
                "name": "imagenet2012",
                "data_dir": placeholder(str),
                "resize": 72 if mini else 256,
                "crop": 64 if mini else 224,
                "flip": True,
                "workers": placeholder(int),
            },
            "model": {
                "name": "ImageNetPlainNet",
                "depth": args.depth,
                "width": 8 if mini else 64,
                "scan": True,
                "remat": "none",
            },
            "optimizer": {"name": "sgd", "learning_rate": 0.02 if mini else 0.1, "momentum": 0.9},
            "schedule": {
                "name": "step_decay",
                "warmup_steps": 5 if mini else 0,
                "boundaries": (0.5, 0.75),
                "factor": 0.1,
            },
            "log_every": 5 if mini else 100,
            "eval_every": epoch,
            "checkpoint_every": 5 if mini else 1_000,
            "keep_checkpoints": 3,
            "tensorboard": False,
            "mesh": {"data": -1, "fsdp": 1},
        }
    )
    set_method(config, args.method)
    if args.method == "near_isometric" and not mini:
        config.optimizer.learning_rate = 0.02  # not tuned
    return config
