"""Prepares a TFDS data set for training: `python launch/prepare_data.py cifar10`.

Every set but `digits` needs TensorFlow here, and only here: `pip install 'orthojax[prepare]'`.
"""

import argparse
import sys

from orthojax.data.prepare import prepare
from orthojax.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="digits, cifar10, cifar100, svhn_cropped, mnist, …")
    parser.add_argument(
        "--data_dir",
        help="where the prepared set goes (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)",
    )
    parser.add_argument(
        "--manual_dir", help="where the archives are that TFDS cannot download, such as ImageNet's"
    )
    arguments = parser.parse_args()
    try:
        directory = prepare(arguments.name, arguments.data_dir, arguments.manual_dir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.name} is prepared in {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
