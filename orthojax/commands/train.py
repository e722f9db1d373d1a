"""Trains what a config describes, or goes on where the same command stopped.

orthojax train                                        # 110 layers on the digits
orthojax train --config=cifar10_plain:preset=cpu --workdir=runs/cifar
orthojax train --config.optimizer.learning_rate=0.05  # any key of the config
"""

import pathlib
import sys

from absl import flags

from orthojax.commands.allocator import keep_freed_memory
from orthojax.commands.command_line import run
from orthojax.commands.config_flag import define_config, load_config, run_name
from orthojax.console import tell


def define_flags():
    define_config()
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of this run's own; by default runs/<config name>, with its arguments and "
        "overrides.",
    )
    flags.DEFINE_bool(
        "keep_memory", True, "Keep the memory that a step frees for the next one (CPUs, glibc)."
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "This is one process of several. Cloud TPU, Slurm and Kubernetes are detected; elsewhere "
        "give the next three too.",
    )
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
    flags.DEFINE_integer("processes", None, "How many processes there are.", lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
    flags.DEFINE_float("timeout", 300.0, "Seconds to wait for the other processes.")


def main():
    from orthojax.parallel.processes import initialize, is_first
    from orthojax.training.train import train_and_evaluate

    options = flags.FLAGS
    if options.keep_memory:
        keep_freed_memory()
    config = load_config()
    workdir = options.workdir or str(pathlib.Path("runs", run_name()))
    peers = (options.coordinator, options.processes, options.process_id)
    if options.distributed or any(option is not None for option in peers):
        initialize(*peers, timeout=options.timeout)
    summary = train_and_evaluate(config, workdir)
    if is_first():
        show(summary, workdir)


def show(summary, workdir):
    for name, value in summary.items():
        shown = f"{value:,}" if isinstance(value, int | float) else value or "-"
        tell(f"{name:>24}  {shown}", sys.stdout)
    written = "summary.json, curves.png, metrics.jsonl, checkpoints/"
    tell(f"\nwritten to {workdir}: {written}", sys.stdout)


def start():
    run(define_flags, main)


if __name__ == "__main__":
    start()
