"""Programs: `orthojax train` and its siblings, and what their command lines have in common."""

from orthojax.extras import require

require("train", "orthojax.commands")
