"""Orthonormal kernels: the penalty, its measures, and the constraint.

views, resolution      which parameters are kernels, and their axes
penalty                what is penalized, with its gradient in closed form
kernels                kernels of one shape in one product
transformation         `optax_ortho`, `decoupled_ortho`: the penalty
stiefel, matrix_adam   `stiefel`: the constraint; Adam with one second moment for a matrix
isometric_conv         convolutions that are isometries as operators
measures, projection   `ortho_penalty`, `orthonormality_error`, `mean_correlation`,
                       `project_orthonormal`
"""

from orthojax.matrices import KernelAxes
from orthojax.ortho import views
from orthojax.ortho.isometric_conv import isometric_conv, isometric_kernel, max_min
from orthojax.ortho.matrix_adam import scale_by_matrix_adam
from orthojax.ortho.measures import mean_correlation, ortho_penalty, orthonormality_error
from orthojax.ortho.projection import project_orthonormal
from orthojax.ortho.soap import SoapState, scale_by_soap, soap
from orthojax.ortho.stiefel import StiefelState, stiefel
from orthojax.ortho.transformation import OrthoState, decoupled_ortho, optax_ortho

__all__ = [
    "KernelAxes",
    "OrthoState",
    "SoapState",
    "StiefelState",
    "decoupled_ortho",
    "isometric_conv",
    "isometric_kernel",
    "max_min",
    "mean_correlation",
    "optax_ortho",
    "ortho_penalty",
    "orthonormality_error",
    "project_orthonormal",
    "scale_by_matrix_adam",
    "scale_by_soap",
    "soap",
    "stiefel",
    "views",
]
