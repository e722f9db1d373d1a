"""`orthojax prepare`, from a checkout."""

import sys

from orthojax.commands.prepare_data import start

if __name__ == "__main__":
    sys.exit(start())
