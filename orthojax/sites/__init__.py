"""Modulation: sites that rescale the error, what steers them, and the ledger of its growth."""

from orthojax.sites.site import (
    SITE,
    init_site,
    is_site,
    measurement,
    modulate,
    rescaling,
    vary_like,
    weights_only,
)

__all__ = [
    "SITE",
    "init_site",
    "is_site",
    "measurement",
    "modulate",
    "rescaling",
    "vary_like",
    "weights_only",
]
