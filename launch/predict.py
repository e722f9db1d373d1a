"""`orthojax predict`, from a checkout."""

import sys

from orthojax.__main__ import run

if __name__ == "__main__":
    sys.exit(run("predict"))
