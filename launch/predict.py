"""`python -m orthojax.launch.predict`, from a checkout."""

from orthojax.launch.command_line import run
from orthojax.launch.predict import define_flags, main

if __name__ == "__main__":
    run(define_flags, main, arguments="IMAGE...")
