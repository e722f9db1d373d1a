"""What a run leaves on disk, or in an object store: checkpoints, records, their directory."""

from orthojax.extras import require

require("train", "orthojax.storage")
