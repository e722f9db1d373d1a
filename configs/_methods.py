"""How a net is started and trained, by name: what the configs and the experiments share."""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from orthojax.isometry import isometric_bias

METHODS = ("near_isometric", "paper", "baseline")
RESIDUAL_METHODS = ("baseline", "paper")

# The paper switches modulation off "after the first n iterations" and gives no n; its error
# profile (Fig. 4) settles after 2,000 to 3,000 of 64,000.
MODULATED_FRACTION = 2_500 / 64_000


def set_method(config: ConfigDict, method: str) -> None:
    """Sets the model's `kernel_init` and `bn_bias`, `modulation` and `regularizer`.

    Args:
      config: with `steps` and `model.depth`.
      method: `near_isometric`, this project's (delta-orthonormal kernels and a BN bias solved from
        the depth, orthonormality, modulation throughout); `paper` (orthonormal kernels,
        orthonormality, modulation for the first n steps); or `baseline` (He initialization, L2).
    """
    if method == "baseline":
        config.model.kernel_init, config.model.bn_bias = "he", 0.0
        config.modulation = None
        config.regularizer = {"name": "l2", "coefficient": 1e-4}
        return
    throughout = method == "near_isometric"
    modulated = placeholder(float) if throughout else round(MODULATED_FRACTION * config.steps)
    config.modulation = {"decay": 0.9, "tolerance": 10.0, "steps": modulated}
    config.regularizer = {"name": "ortho", "coefficient": 1e-4}
    if throughout:
        config.model.kernel_init = "delta_orthonormal"
        config.model.bn_bias = round(isometric_bias(config.model.depth - 1), 2)
    else:
        config.model.kernel_init, config.model.bn_bias = "orthonormal", 0.0
