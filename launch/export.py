"""`python -m orthojax.launch.export`, from a checkout."""

from orthojax.launch.command_line import run
from orthojax.launch.export import define_flags, main

if __name__ == "__main__":
    run(define_flags, main, arguments="FILE")
