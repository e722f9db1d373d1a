"""Orthonormal kernels: the penalty, its variants, its measures, and the constraint.

views, resolution      which parameters are kernels, and their axes
variants, conv         what is penalized, with gradients in closed form
kernels                kernels of one shape in one product
transformation         `optax_ortho`, `decoupled_ortho`: the penalty
stiefel, matrix_adam   `stiefel`: the constraint; Adam with one second moment for a matrix
isometric_conv         convolutions that are isometries as operators
measures, projection   `ortho_penalty`, `orthonormality_error`, `mean_correlation`,
                       `project_orthonormal`
"""

from orthojax.matrices import KernelAxes
from orthojax.ortho import views
from orthojax.ortho.conv import Conv
from orthojax.ortho.isometric_conv import isometric_conv, isometric_kernel, max_min
from orthojax.ortho.kernels import VARIANTS
from orthojax.ortho.matrix_adam import scale_by_matrix_adam
from orthojax.ortho.measures import mean_correlation, ortho_penalty, orthonormality_error
from orthojax.ortho.projection import project_orthonormal
from orthojax.ortho.soap import SoapState, scale_by_soap, soap
from orthojax.ortho.stiefel import StiefelState, stiefel
from orthojax.ortho.transformation import OrthoState, decoupled_ortho, optax_ortho
from orthojax.ortho.variants import (
    SRIP,
    Cosine,
    Double,
    Frobenius,
    Layout,
    MutualCoherence,
    Variant,
)

__all__ = [
    "SRIP",
    "VARIANTS",
    "Conv",
    "Cosine",
    "Double",
    "Frobenius",
    "KernelAxes",
    "Layout",
    "MutualCoherence",
    "OrthoState",
    "SoapState",
    "StiefelState",
    "Variant",
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
