"""What `digits_plain110.py` cures: SGD and L2 from He initialization, all else equal."""

from ml_collections import ConfigDict

from orthojax.configs import digits_plain110


def get_config(arguments: str | None = None) -> ConfigDict:
    """Takes the arguments of `digits_plain110.py`."""
    config = digits_plain110.get_config(arguments)
    config.model.kernel_init = "he"
    config.model.bn_bias = 0.0
    config.modulation = None
    config.regularizer = {"name": "l2", "coefficient": 1e-4}
    return config
