"""What training tells of the layers, besides loss and accuracy: the paper's Figures 2, 3 and 4."""

from typing import Any

import jax

from orthojax.models import in_order
from orthojax.modulation import read
from orthojax.ortho import mean_correlation, orthonormality_error


def observe(params: Any, moments: Any) -> dict[str, Any]:
    """Numbers about the layers of a `ConvNet`; can be called under `jax.jit`.

    Args:
      params: parameters of the net.
      moments: states of its modulation sites, which measure the errors also where the policy's
        mode is "observe"; empty without sites.

    Returns:
      `correlation`: Eq. 8 as printed (see `orthojax.mean_correlation`); `correlation_off_diagonal`
      and `correlation_absolute`: without the diagonal, and of absolute values besides;
      `orthonormality_error`: the largest of all kernels; and, if there are sites,
      `second_moment` and `scale`: of the error at each convolution's output and the `ρ` applied
      there, lists from the images to the logits.
    """
    errors = orthonormality_error(params).values()
    found = {
        "correlation": mean_correlation(params),
        "correlation_off_diagonal": mean_correlation(params, diagonal=False),
        "correlation_absolute": mean_correlation(params, diagonal=False, absolute=True),
        "orthonormality_error": jax.numpy.max(jax.numpy.stack(list(errors))),
    }
    if moments:
        sites = [read(state) for _, state in in_order(moments)]
        found["second_moment"] = [site.second_moment for site in sites]
        found["scale"] = [site.scale for site in sites]
    return found
