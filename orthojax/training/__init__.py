"""A config built into programs, and the loop that runs them."""

from orthojax.extras import require

require("train", "orthojax.training")
