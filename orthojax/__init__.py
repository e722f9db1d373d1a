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
    scale_by_soap,
    soap,
    stiefel,
    views,
)
from orthojax.sites import init_site, modulate

__version__ = "0.1.0"

# What needs Flax; the rest does not.
_LAZY = {
    "describe_net": "orthojax.models.summary",
    "load": "orthojax.inference",
    "train_and_evaluate": "orthojax.training.train",
}

__all__ = [
    "decoupled_ortho",
    "delta_orthonormal",
    "describe",
    "describe_net",
    "init_site",
    "linen",
    "load",
    "mean_correlation",
    "modulate",
    "modulation",
    "optax_ortho",
    "ortho_penalty",
    "orthonormal",
    "orthonormality_error",
    "project_orthonormal",
    "read",
    "scale_by_matrix_adam",
    "scale_by_soap",
    "soap",
    "stiefel",
    "train_and_evaluate",
    "views",
]


def __getattr__(name):
    if name == "linen":
        return importlib.import_module("orthojax.linen")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
