"""Very deep convolutional networks without shortcuts, by orthonormality and modulation."""

import importlib

from orthojax.describe import describe
from orthojax.initializers import delta_orthonormal, orthonormal
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
from orthojax.sites.modulation import modulation, read_moments

__version__ = "0.1.0"

# What needs more than JAX and optax, and the module that has it.
_LAZY = {
    "describe_net": "orthojax.models",
    "linen": "orthojax.linen",
    "load_classifier": "orthojax.inference",
    "nnx": "orthojax.nnx",
    "train_and_evaluate": "orthojax.training.train",
}
_RENAMED = {"load": "load_classifier", "read": "read_moments"}

__all__ = [
    "decoupled_ortho",
    "delta_orthonormal",
    "describe",
    "describe_net",
    "init_site",
    "linen",
    "load_classifier",
    "mean_correlation",
    "modulate",
    "modulation",
    "nnx",
    "optax_ortho",
    "ortho_penalty",
    "orthonormal",
    "orthonormality_error",
    "project_orthonormal",
    "read_moments",
    "scale_by_matrix_adam",
    "scale_by_soap",
    "soap",
    "stiefel",
    "train_and_evaluate",
    "views",
]


def __getattr__(name):
    if name in _LAZY:
        module = importlib.import_module(_LAZY[name])
        return module if name in ("linen", "nnx") else getattr(module, name)
    if name in _RENAMED:
        raise AttributeError(f"orthojax.{name} is called orthojax.{_RENAMED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__})
