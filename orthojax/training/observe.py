"""What training tells of the layers, besides loss and accuracy: the paper's Figures 2, 3 and 4."""

from typing import Any

import jax
from flax import traverse_util

from orthojax.models import in_order
from orthojax.ortho import mean_correlation, orthonormality_error
from orthojax.sites import weights_only
from orthojax.sites.modulation import find_state


def observe(params: Any, opt_state: Any, view: Any = None) -> dict[str, Any]:
    """Figures of the layers of a `ConvNet`; can be called under `jax.jit`.

    Args:
      params: parameters of the net.
      opt_state: of its optimizer; with `orthojax.modulation` in it, also one whose tolerance is
        infinite, it holds what the sites measured.
      view: of the kernels, see `orthojax.optax_ortho`.

    Returns:
      `correlation`: Eq. 8 as printed (see `orthojax.mean_correlation`); `correlation_off_diagonal`
      and `correlation_absolute`: without the diagonal, and of absolute values besides;
      `orthonormality_error`: the largest of all kernels; and, if there are sites,
      `second_moment` and `scale`: of the error at each convolution's output and the `ρ` applied
      there, lists from the images to the logits.
    """
    params = weights_only(params)
    errors = orthonormality_error(params, view=view).values()
    found = {
        "correlation": mean_correlation(params, view=view),
        "correlation_off_diagonal": mean_correlation(params, diagonal=False, view=view),
        "correlation_absolute": mean_correlation(params, diagonal=False, absolute=True, view=view),
        "orthonormality_error": jax.numpy.max(jax.numpy.stack(list(errors))),
    }
    state = find_state(opt_state)
    if state is not None:
        for name, values in (("second_moment", state.moments), ("scale", state.scales)):
            tree = traverse_util.unflatten_dict(values, sep="/")
            found[name] = [value for _, value in in_order(tree)]
        found["log_growth"] = state.log_growth
    return found
