"""A config that compiles fast: a net of five layers on the digits."""

from orthojax.configs import digits_plain110


def get_config():
    """Twenty steps, each recorded; evaluated on a validation split, and at the end on the test."""
    config = digits_plain110.get_config("depth=8,steps=20")
    config.model = {"name": "tests.models.small_nets:SmallPlainNet", "width": 8}
    config.batch_size, config.mesh.data = 32, 1
    config.dataset.validation, config.patience = 0.1, 9
    config.log_every, config.eval_every, config.checkpoint_every = 1, 10, 5
    return config
