"""Very deep convolutional networks without shortcuts, by orthonormality and modulation."""

from orthojax.describe import describe
from orthojax.initializers import delta_orthonormal, orthonormal
from orthojax.modulation import init_site, modulate, modulation
from orthojax.ortho import (
    decoupled_ortho,
    mean_correlation,
    optax_ortho,
    ortho_penalty,
    orthonormality_error,
    project_orthonormal,
    views,
)

__version__ = "0.1.0"

__all__ = [
    "decoupled_ortho",
    "delta_orthonormal",
    "describe",
    "describe_net",
    "init_site",
    "modulate",
    "modulation",
    "mean_correlation",
    "optax_ortho",
    "ortho_penalty",
    "orthonormality_error",
    "orthonormal",
    "project_orthonormal",
    "views",
]


def __getattr__(name):
    if name == "describe_net":  # it needs Flax, the rest does not
        from orthojax.models.summary import describe_net

        return describe_net
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
