"""`python -m orthojax.launch.prepare_data`, from a checkout."""

import sys

from orthojax.launch.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())
