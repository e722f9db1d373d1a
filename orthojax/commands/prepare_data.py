"""Prepares a TFDS data set for training: `orthojax prepare cifar10`.

Every set but `digits` and `mnist5000` needs TensorFlow here, and only here:
`pip install 'orthojax-nets[prepare]'`.
With `--resize=256` photographs are then written again as squares of 256 pixels, as a set of its
own, `imagenet2012_256`, which needs `pip install 'orthojax-nets[imagenet]'`.
"""

import argparse
import signal
import sys

from orthojax.commands.command_line import exit_status
from orthojax.console import escape_what_cannot_be_encoded
from orthojax.data.prepare import prepare
from orthojax.data.reencode import reencode
from orthojax.storage.paths import is_remote, output_directory


def start() -> int:
    escape_what_cannot_be_encoded()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="digits, mnist5000, cifar10, cifar100, svhn_cropped, mnist, …")
    parser.add_argument(
        "--data_dir",
        help="where the prepared set goes (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)",
    )
    parser.add_argument(
        "--manual_dir", help="where the archives are that TFDS cannot download, such as ImageNet's"
    )
    parser.add_argument(
        "--resize",
        type=int,
        metavar="SIZE",
        help="write NAME_SIZE too: every photograph as a square of SIZE pixels",
    )
    parser.add_argument("--quality", type=int, default=95, help="of its JPEGs (default: 95)")
    parser.add_argument("--workers", type=int, help="threads that write it (default: one per core)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # cleans up, as Ctrl-C
    return exit_status(lambda: _prepare(arguments))


def _prepare(arguments: argparse.Namespace) -> None:
    name, data_dir, manual_dir = arguments.name, arguments.data_dir, arguments.manual_dir
    if data_dir and not is_remote(data_dir):
        output_directory(data_dir)
    if arguments.resize is None:
        directory = prepare(name, data_dir, manual_dir)
    else:
        numbers = {"quality": arguments.quality, "workers": arguments.workers}
        directory = reencode(name, arguments.resize, data_dir, manual_dir, **numbers)
    print(f"{name} is prepared in {directory}")


if __name__ == "__main__":
    sys.exit(start())
