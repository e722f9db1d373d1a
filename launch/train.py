"""`python -m orthojax.launch.train`, from a checkout."""

from orthojax.launch.command_line import run
from orthojax.launch.train import define_flags, main

if __name__ == "__main__":
    run(define_flags, main)
