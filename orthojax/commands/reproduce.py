"""Runs an experiment and writes its records, a picture and a report.

orthojax reproduce table2                            # on two CPU cores
orthojax reproduce gap --seeds=3 --data_dir=DIR      # DIR with a prepared cifar10
orthojax reproduce all --preset=full                 # the paper's protocol

Start the same command several times to use more cores or machines; interrupt it anywhere and start
it again to go on. `--resume` does that alone: it is an error where nothing was started.
`--finished` trains nothing and reports on what there is.
"""

import argparse
import dataclasses
import fnmatch
import importlib
import os
import pathlib
import sys

from orthojax.commands.allocator import add_keep_memory, keep_freed_memory
from orthojax.commands.command_line import exit_status, keep_compiled_programs, leave_on_signals
from orthojax.console import escape_what_cannot_be_encoded, tell
from orthojax.errors import WorkdirError
from orthojax.storage.paths import local_path, output_directory

keep_compiled_programs()

FIGURES = ("figure2", "figure3", "figure4", "figure5", "figure6")
PAPER = ("table2", *FIGURES, "appendix", "theory")
BEYOND = ("modulation", "mnist", "hard_cases", "ablation", "depth", "constraint", "good_init")
AGAINST = ("gap", "long_run", "race", "rivals")


@dataclasses.dataclass(frozen=True)
class Options:
    """What an experiment is told.

    Attributes:
      name: of the experiment.
      preset: `cpu` or `full`.
      seeds: those of every arm.
      data_dir: of prepared data sets, or None.
      workdir: of the experiment.
    """

    name: str
    preset: str
    seeds: tuple[int, ...]
    data_dir: str | None
    workdir: pathlib.Path

    def arm(self, *names):
        """Directory and seeds of an arm of these names.

        Example:
          >>> options = Options("depth", "cpu", (0, 1), None, pathlib.PurePosixPath("runs"))
          >>> options.arm("the paper's start, modulated", 110)
          (PurePosixPath('runs/the_papers_start_modulated_110'), (0, 1))
        """
        name = "_".join(map(str, names)).replace(" ", "_").replace(",", "").replace("'", "")
        return self.workdir / name, self.seeds


def start():
    escape_what_cannot_be_encoded()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (*PAPER, *BEYOND, *AGAINST)
    parser.add_argument("experiment", choices=(*names, "all"), metavar="|".join((*names, "all")))
    parser.add_argument("--preset", choices=("cpu", "full"), default="cpu")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    parser.add_argument("--data_dir", default=os.environ.get("ORTHOJAX_DATA_DIR"))
    parser.add_argument("--workdir", type=local_path, default=pathlib.Path("runs", "reproduce"))
    parser.add_argument(
        "--resume", action="store_true", help="only go on with what is in the workdir"
    )
    parser.add_argument(
        "--finished", action="store_true", help="train nothing; report on what has been trained"
    )
    parser.add_argument(
        "--only", metavar="PATTERN", help="train only arms of such names, such as '*44*SOAP*'"
    )
    add_keep_memory(parser)
    arguments = parser.parse_args()
    if arguments.keep_memory:
        keep_freed_memory()
    leave_on_signals()
    if arguments.seeds < 1:
        parser.error(f"--seeds={arguments.seeds}: there must be one")
    return exit_status(lambda: reproduce(arguments))


def reproduce(arguments):
    """Trains what is not trained yet, then writes the reports."""
    from orthojax.experiments.sweep import finished, plan, work

    wanted = PAPER if arguments.experiment == "all" else (arguments.experiment,)
    if arguments.resume and not any(arguments.workdir.glob(f"*_{arguments.preset}")):
        raise WorkdirError(
            f"--resume: {arguments.workdir} holds no experiment of the preset "
            f"`{arguments.preset}`; choose its --workdir, or leave --resume out to start"
        )

    if not arguments.finished:
        output_directory(arguments.workdir)
    for name in wanted:
        experiment = load(name)
        workdir = arguments.workdir / f"{name}_{arguments.preset}"
        seeds = tuple(range(arguments.seeds))
        options = Options(name, arguments.preset, seeds, arguments.data_dir, workdir)
        jobs = select(experiment.jobs(options), arguments.only)
        if jobs and not arguments.finished:
            tell_plan(name, plan(select(experiment.jobs(options), arguments.only)))
        results = finished(jobs) if arguments.finished else work(jobs)
        if jobs and not results:
            raise WorkdirError(
                f"--finished: no arm of `{name}` is finished in {arguments.workdir}; choose "
                "its --workdir, or leave --finished out to train"
            )
        experiment.report(options, results)
        print(f"written to {workdir}: report.md")


def load(name):
    """The module of an experiment, with its `jobs(options)` and `report(options, results)`."""
    module = "figures" if name in FIGURES else name
    return importlib.import_module(f"orthojax.experiments.{module}")


def select(jobs, pattern):
    """Those of the jobs whose names match; all of them where there is no pattern."""
    if pattern is None:
        return jobs
    named = {title(key): key for key in jobs}
    kept = fnmatch.filter(named, pattern)
    if not kept:
        arms = ", ".join(map(repr, named)) or "none"
        raise WorkdirError(f"--only={pattern!r} matches no arm; there are {arms}")
    return {named[arm]: jobs[named[arm]] for arm in kept}


def title(arm):
    """Of an arm: the key of a job, or what is in it where that is a tuple."""
    return ", ".join(map(str, arm)) if isinstance(arm, tuple) else str(arm)


def tell_plan(name, arms):
    """What an experiment trains: how many runs of each arm are done, and how many left."""
    done, left = (set().union(*runs) for runs in zip(*arms.values(), strict=True))
    finished = sum(not of_arm for _, of_arm in arms.values())
    tell(
        f"{name}: {len(arms)} arms, {finished} finished; {len(done)} runs done, {len(left)} left, "
        "and more where a learning rate is searched"
    )
    for arm, (of_arm, missing) in arms.items():
        tell(f"  {title(arm)}: {len(of_arm)} done, {len(missing)} left")


if __name__ == "__main__":
    sys.exit(start())
