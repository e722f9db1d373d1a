"""Draws the first-layer filters of trained nets beside each other: Figure 6 of the paper.

python launch/draw_filters.py OUT.png 'L2=runs/a' 'orthonormal=runs/b'

Each argument is a title and a working directory; its newest checkpoint is taken. No data is needed,
and the runs may be training.
"""

import argparse
import sys

from orthojax.commands.command_line import exit_status
from orthojax.errors import UserError
from orthojax.experiments.filters import first_kernel, picture_of_filters
from orthojax.pictures.picture import check_picture, write_picture
from orthojax.storage.paths import to_path


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture")
    parser.add_argument("runs", nargs="+", metavar="TITLE=WORKDIR")
    parser.add_argument(
        "--own_net",
        metavar="MODULE:NET",
        help="of the runs, if it is none of orthojax.models: that module is run",
    )
    return exit_status(lambda: draw(parser.parse_args(arguments)))


def draw(options):
    check_picture(options.picture)
    kernels = {}
    for argument in options.runs:
        title, equals, workdir = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is not TITLE=WORKDIR")
        kernels[title] = first_kernel(to_path(workdir), options.own_net)
    write_picture(picture_of_filters(kernels), options.picture)


if __name__ == "__main__":
    sys.exit(main())
