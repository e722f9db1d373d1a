"""Draws the first-layer filters of trained nets beside each other: Figure 6 of the paper.

python launch/draw_filters.py OUT.png 'L2=runs/a' 'orthonormal=runs/b'

Each argument is a title and a working directory; its newest checkpoint is taken. No data is needed.
"""

import argparse
import json
import pathlib
import sys

import numpy as np

from orthojax.analysis.filters import draw_filters
from orthojax.config.sections import from_json
from orthojax.errors import UserError
from orthojax.storage.checkpoint import Checkpointer
from orthojax.storage.paths import to_path
from orthojax.training.compiled import abstract_state
from orthojax.training.experiment import build


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=to_path)
    parser.add_argument("runs", nargs="+", metavar="TITLE=WORKDIR")
    options = parser.parse_args(arguments)
    kernels = {}
    for argument in options.runs:
        title, equals, workdir = argument.partition("=")
        if not equals or not (to_path(workdir) / "config.json").exists():
            parser.error(f"{argument!r} is not TITLE=WORKDIR of a run (with a config.json in it)")
        try:
            kernels[title] = first_kernel(to_path(workdir))
        except UserError as error:
            print(f"error: {workdir}: {error}", file=sys.stderr)
            return 2
    draw_filters(kernels, options.picture)
    return 0


def first_kernel(workdir: pathlib.Path) -> np.ndarray:
    """The stem's kernel, (H, W, C, M), of the newest checkpoint."""
    config = from_json(json.loads((workdir / "config.json").read_text()))
    config.mesh.data, config.mesh.fsdp = 1, 1
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        restored = checkpointer.restore_latest(abstract_state(build(config, records=False)))
    if restored is None:
        raise UserError("there is no checkpoint yet")
    return np.asarray(restored.state.params["stem"]["conv"]["kernel"])


if __name__ == "__main__":
    sys.exit(main())
