"""What the reports of all experiments share: records, spread, heading, tables, pictures."""

import json
import statistics

from orthojax.benchmarks.environment import environment
from orthojax.experiments.sweep import RECORD
from orthojax.pictures.picture import write_picture
from orthojax.storage.paths import write_atomic


def accuracy(records):
    """Test accuracy in % with its spread: `98.43 ± 0.16`; a run that diverged counts as 0.

    Example:
      >>> accuracy([{"test_accuracy": 0.5, "diverged": None}])
      '50.00'
    """
    values = [100 * record["test_accuracy"] for record in records]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    diverged = sum(record["diverged"] is not None for record in records)
    if diverged == len(records):
        return "diverged"
    return f"{statistics.fmean(values):.2f}{spread}" + (f" ({diverged} diverged)" * bool(diverged))


CELLS = ("learning rate", "test accuracy (%)", "each")


def cells(records):
    """What `CELLS` is the heading of: the rate of an arm, its mean with the spread, every run.

    Example:
      >>> record = {"diverged": None, "learning_rate": 0.1}
      >>> cells([{"test_accuracy": 0.5, **record}, {"test_accuracy": 0.6, **record}])
      ['0.1', '55.00 ± 7.07', '50.0, 60.0']
    """
    each = ", ".join(f"{100 * record['test_accuracy']:.1f}" for record in records)
    return [f"{records[0]['learning_rate']:g}", accuracy(records), each]


def table(headings, rows):
    """Markdown.

    Example:
      >>> print(table(["depth", "%"], [[44, "97.1"]]))
      | depth | % |
      |---|---|
      | 44 | 97.1 |
    """
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(
        "|" + "|".join(line) + "|" if line[0] == "---" else "| " + " | ".join(map(str, line)) + " |"
        for line in lines
    )


def save_picture(options, name, picture):
    """Writes a matplotlib figure as PNG and SVG into the workdir; returns the Markdown of it."""
    options.workdir.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        write_picture(picture, options.workdir / f"{name}.{kind}")
    return f"![{name}]({name}.png)"


def write_report(options, title, *paragraphs, pictures=None, curves=None, records=None, runs=None):
    """Writes report.md, records.jsonl and the pictures, each as PNG and SVG, into the workdir.

    Args:
      options: of `launch/reproduce.py`.
      title: heading of the report.
      *paragraphs: Markdown.
      pictures: name -> matplotlib figure; they come before the paragraphs.
      curves: what the pictures are drawn of, `(directory of the run, name, steps, values)`; they
        go to curves.jsonl, to four digits.
      records: dictionaries, of what trains nothing; None is the records of all runs, those of
        searches too.
      runs: the directory that the runs are in; None is the workdir.
    """
    workdir = options.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    seeds = ", ".join(map(str, options.seeds))
    about = "; ".join(f"{name}: {value}" for name, value in environment().items())
    parts = [f"# {title}", f"{about}; seeds: {seeds}; ± is the standard deviation over them."]
    parts += [save_picture(options, *named) for named in (pictures or {}).items()]
    write_atomic(
        workdir / "report.md",
        "\n\n".join([*parts, *paragraphs, ""]).encode(errors="backslashreplace"),
    )
    if records is None:
        paths = sorted((runs or workdir).rglob(RECORD))
        records = [
            {"run": str(path.parent.relative_to(runs or workdir)), **json.loads(path.read_bytes())}
            for path in paths
        ]
    _write_lines(workdir / "records.jsonl", records)
    if curves:
        lines = [
            {
                "run": str(run.relative_to(runs or workdir)),
                "curve": name,
                "steps": steps,
                "values": [float(f"{value:.4g}") for value in values],
            }
            for run, name, steps, values in curves
        ]
        _write_lines(workdir / "curves.jsonl", lines)


def _write_lines(path, records):
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records).encode())
