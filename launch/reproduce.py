"""`orthojax reproduce`, from a checkout."""

import sys

from orthojax.commands.reproduce import start

if __name__ == "__main__":
    sys.exit(start())
