"""Very deep convolutional networks without shortcuts, by orthonormality and modulation."""

import importlib

from orthojax.describe import describe
from orthojax.initializers import delta_orthonormal, orthonormal
from orthojax.modulator import modulation, read
from orthojax.ortho import (
    decoupled_ortho,
    mean_correlation,
    optax_ortho,
    ortho_penalty,
    orthonormality_error,
    project_orthonormal,
    scale_by_matrix_adam,
    stiefel,
    views,
)
from orthojax.sites import init_site, modulate

__version__ = "0.1.0"

__all__ = [
    "decoupled_ortho",
    "delta_orthonormal",
    "describe",
    "describe_net",
    "init_site",
    "linen",
    "modulate",
    "modulation",
    "mean_correlation",
    "optax_ortho",
    "ortho_penalty",
    "orthonormality_error",
    "orthonormal",
    "project_orthonormal",
    "read",
    "scale_by_matrix_adam",
    "stiefel",
    "views",
]


def __getattr__(name):
    # What needs Flax; the rest does not.
    if name == "linen":
        return importlib.import_module("orthojax.linen")
    if name == "describe_net":
        return importlib.import_module("orthojax.models.summary").describe_net
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
