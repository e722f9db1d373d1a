"""Draws the curves of several runs in one picture and prints their test accuracies.

python launch/compare_runs.py OUT.png 'plain=runs/a,runs/b' 'residual=runs/c'

Each argument is a name and the working directories of its runs, one for each seed.
"""

import argparse
import json
import statistics
import sys

from orthojax.analysis.curves import draw_comparison
from orthojax.console import escape_what_cannot_be_encoded
from orthojax.storage.metrics import read_metrics
from orthojax.storage.paths import to_path


def main(arguments=None):
    escape_what_cannot_be_encoded()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=to_path)
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR[,WORKDIR...]")
    parser.add_argument("--title", default="")
    options = parser.parse_args(arguments)

    curves = {}
    for argument in options.runs:
        name, equals, workdirs = argument.partition("=")
        if not equals:
            parser.error(f"{argument!r} is not NAME=WORKDIR[,WORKDIR...]")
        paths = [to_path(workdir) for workdir in workdirs.split(",")]
        for path in paths:
            if not (path / "summary.json").exists():
                parser.error(f"{path} holds no finished run (no summary.json in it)")
        curves[name] = [read_metrics(path) for path in paths]
        summaries = [json.loads((path / "summary.json").read_text()) for path in paths]
        accuracies = [100 * summary["test_accuracy"] for summary in summaries]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(accuracies) > 1 else ""
        seconds = statistics.mean(summary["seconds"] for summary in summaries)
        print(
            f"{name}: test accuracy {statistics.mean(accuracies):.2f}{spread} % "
            f"(n = {len(accuracies)}: {', '.join(f'{a:.2f}' for a in accuracies)}), "
            f"{seconds:.0f} s each"
        )
    draw_comparison(curves, options.picture, options.title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
