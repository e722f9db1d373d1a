"""Draws the curves of several runs in one picture and prints their test accuracies.

python launch/compare_runs.py OUT.png 'plain=runs/a,runs/b' 'residual=runs/c'

Each argument is a name and the working directories of its runs, one for each seed.
"""

import argparse
import statistics
import sys

from orthojax.commands.command_line import exit_status
from orthojax.console import escape_what_cannot_be_encoded, printable, tell
from orthojax.errors import UserError
from orthojax.pictures.curves import draw_comparison
from orthojax.pictures.picture import check_picture
from orthojax.storage.metrics import read_metrics
from orthojax.storage.paths import to_path
from orthojax.storage.workdir import read_run_file
from orthojax.training.summary import SUMMARY


def main(arguments=None):
    escape_what_cannot_be_encoded()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture")
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR[,WORKDIR...]")
    parser.add_argument("--title", default="")
    options = parser.parse_args(arguments)
    return exit_status(lambda: compare(options))


def compare(options):
    check_picture(options.picture)
    curves = {}
    for argument in options.runs:
        name, equals, workdirs = argument.partition("=")
        if not equals:
            raise UserError(f"{argument!r} is not NAME=WORKDIR[,WORKDIR...]")
        whole = to_path(workdirs)  # a comma may be part of a name
        paths = [whole] if whole.exists() else [*map(to_path, workdirs.split(","))]
        for path in paths:
            if not (path / SUMMARY).exists():
                raise UserError(f"{path} holds no finished run (no {SUMMARY} in it)")
        curves[name] = [read_metrics(path) for path in paths]
        summaries = [read_run_file(path, SUMMARY) for path in paths]
        accuracies = [100 * summary["test_accuracy"] for summary in summaries]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        seconds = statistics.mean(summary["seconds"] for summary in summaries)
        tell(
            f"{printable(name)}: test accuracy {statistics.mean(accuracies):.2f}{spread} % "
            f"(n = {len(accuracies)}: {', '.join(f'{a:.2f}' for a in accuracies)}), "
            f"{seconds:.0f} s each",
            sys.stdout,
        )
    draw_comparison(curves, options.picture, options.title)


if __name__ == "__main__":
    sys.exit(main())
