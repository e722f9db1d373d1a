"""Very deep convolutional networks without shortcuts, by orthonormality and modulation."""

from orthojax.describe import describe
from orthojax.initializers import delta_orthonormal, orthonormal
from orthojax.modulation import (
    Moments,
    Policy,
    calibrate,
    first_link,
    init_state,
    modulate,
    read,
)
from orthojax.ortho import (
    decoupled_ortho,
    optax_ortho,
    ortho_penalty,
    orthonormality_error,
    project_orthonormal,
    views,
)

__version__ = "0.1.0"

__all__ = [
    "Moments",
    "Policy",
    "calibrate",
    "decoupled_ortho",
    "delta_orthonormal",
    "describe",
    "first_link",
    "init_state",
    "modulate",
    "optax_ortho",
    "ortho_penalty",
    "orthonormality_error",
    "orthonormal",
    "project_orthonormal",
    "read",
    "views",
]
