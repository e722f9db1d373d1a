"""What the reports of all experiments share: columns of tables, pictures, the files themselves."""

import inspect
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from orthojax.benchmarks.environment import environment
from orthojax.experiments.sweep import RECORD
from orthojax.pictures.picture import COLORS, clear_frame, new_picture, write_picture
from orthojax.storage.metrics import read_metrics
from orthojax.storage.paths import write_atomic


def percent(records):
    """Test accuracies in %."""
    return [100 * record["test_accuracy"] for record in records]


def spread(values, sign=""):
    """Mean and standard deviation.

    Example:
      >>> spread([1.0, 2.0])
      '1.50 ± 0.71'
    """
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):{sign}.2f}{deviation}"


def accuracy(records):
    """Test accuracy in % with its spread: `98.43 ± 0.16`; a run that diverged counts as 0.

    Example:
      >>> accuracy([{"test_accuracy": 0.5, "diverged": None}])
      '50.00'
    """
    diverged = sum(record["diverged"] is not None for record in records)
    if diverged == len(records):
        return "diverged"
    return spread(percent(records)) + (f" ({diverged} diverged)" * bool(diverged))


def accuracy_at(records):
    """With the learning rate."""
    return f"{accuracy(records)} (at {records[0]['learning_rate']:g})"


def mean(records, key):
    """Of one figure of the runs of an arm."""
    return statistics.fmean(record[key] for record in records)


# What stands in a column, by its heading, of an arm's records.
COLUMNS = {
    "steps": lambda records: f"{records[0]['steps']:,}",
    "learning rate": lambda records: f"{records[0]['learning_rate']:g}",
    "test accuracy (%)": accuracy,
    "each": lambda records: ", ".join(f"{value:.1f}" for value in percent(records)),
    "training loss": lambda records: f"{mean(records, 'train_loss'):.3f}",
    "n": len,
}
CELLS = ("learning rate", "test accuracy (%)", "each")


def arms_table(headings, results, **own):
    """A row for each arm, in Markdown.

    Args:
      headings: of the parts of an arm's name, and then of `COLUMNS` or of one's own.
      results: the records of every arm.
      **own: a column's heading -> a function of the records of an arm.
    """
    columns, rows = COLUMNS | own, []
    for arm, records in results.items():
        parts = arm if isinstance(arm, tuple) else (arm,)
        rows.append([*parts, *(columns[heading](records) for heading in headings[len(parts) :])])
    return table(headings, rows)


def table(headings, rows):
    """Markdown.

    Example:
      >>> print(table(["depth", "%"], [[44, "97.1"]]))
      | depth | % |
      |---|---|
      | 44 | 97.1 |
    """
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in (headings, *rows)]
    return "\n".join([lines[0], "|---" * len(headings) + "|", *lines[1:]])


def curve(record, kind, key="accuracy", scale=1.0):
    """`(steps, values)` that a run has measured; accuracies are in %."""
    scale = 100 * scale if key == "accuracy" else scale
    found = [m for m in read_metrics(record["workdir"]) if m["kind"] == kind]
    return [m["step"] for m in found], [scale * m[key] for m in found]


class Line(NamedTuple):
    """Of a picture. Lines of the same label, seeds of an arm, have one color and one legend."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: Mapping[str, Any] = {}


def lines_of(arms, *place, **style):
    """A line for every run of `label -> records`, of what `curve` finds at a place."""
    return [
        Line(label, *curve(record, *place), style)
        for label, records in arms.items()
        for record in records
    ]


POINTS = {"linestyle": "", "marker": "o", "markersize": 3}


def draw(*panels, width=4.5, sharey=False):
    """A picture of lines, beside each other.

    Args:
      *panels: `(lines, settings of their axes)`.
      width: of each panel, in inches.
      sharey: whether they have one y axis.
    """
    picture = new_picture(width * len(panels), 3.7)
    row, told = picture.subplots(1, len(panels), squeeze=False, sharey=sharey)[0], set()
    for axes, (lines, settings) in zip(row, panels, strict=True):
        labels = list(dict.fromkeys(line.label for line in lines))
        for line in lines:
            index = labels.index(line.label)
            dashes = ("-", "--", ":")[index // len(COLORS) % 3]
            style = {"color": COLORS[index % len(COLORS)], "linestyle": dashes, "linewidth": 1.2}
            axes.plot(line.x, line.y, label=line.label, **style | line.style)
        axes.set(**settings)
        if "xticks" in settings:
            axes.minorticks_off()
        clear_frame(axes)
        handles = reversed(list(zip(*axes.get_legend_handles_labels(), strict=True)))
        found = {label: handle for handle, label in handles if label not in told}
        legend = {label: found[label] for label in labels if label in found}
        told |= legend.keys()
        if len(legend) > len(COLORS):
            _legend(picture, legend, "outside right center")
        elif legend:
            _legend(axes, legend, "best")
    return picture


def against_depth(arms):
    """A panel for `draw`: of `(depth, label) -> records` the means, and a dot for every run."""
    lines, depths = [], sorted({depth for depth, _ in arms})
    for name in dict.fromkeys(name for _, name in sorted(arms, key=lambda arm: -arm[0])):
        values = {depth: percent(arms[depth, name]) for depth in depths if (depth, name) in arms}
        lines.append(Line(name, list(values), [*map(statistics.fmean, values.values())]))
        lines += [Line(name, [depth] * len(v), v, POINTS) for depth, v in values.items()]
    ticks = {"xticks": depths, "xticklabels": [f"{depth:,}" for depth in depths]}
    axes = {"xlabel": "layers", "ylabel": "test accuracy (%)", "ylim": (0, 101)}
    return lines, {"xscale": "log", **ticks, **axes}


def bars(panels, ticks=None):
    """A picture of bars, the mean of every arm, and a dot for every run.

    Args:
      panels: title -> row -> label -> records; all have the same rows.
      ticks: None, or what they mean, and title -> row -> % or None.
    """
    rows = list(next(iter(panels.values())))
    groups = [group for found in panels.values() for group in found.values()]
    labels = list(dict.fromkeys(label for group in groups for label in group))
    thick, legend = 0.8 / len(labels), {}
    picture = new_picture(2 + 4 * len(panels), 1 + (0.15 + 0.15 * len(labels)) * len(rows))
    beside = picture.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, found) in zip(beside, panels.items(), strict=True):
        for row, group in enumerate(found.values()):
            for label, records in group.items():
                index, values = labels.index(label), percent(records)
                at = row + thick * (index - (len(labels) - 1) / 2)
                bar = axes.barh(at, statistics.fmean(values or [0.0]), thick, color=COLORS[index])
                axes.plot(values, [at] * len(values), "k.", markersize=4)
                legend.setdefault(label, bar)
            tick = ticks and ticks[1][title][rows[row]]
            if tick is not None:
                (line,) = axes.plot([tick] * 2, [row - 0.45, row + 0.45], color="black")
                legend.setdefault(ticks[0], line)
        axes.set_yticks(range(len(rows)), rows)
        axes.set(title=title, xlabel="test accuracy (%)", xlim=(0, 100))
        clear_frame(axes)
    beside[0].invert_yaxis()
    if len(legend) > 1:
        _legend(picture, legend, "outside lower center", ncols=len(legend))
    return picture


def _legend(place, legend, where, **style):
    place.legend(legend.values(), legend.keys(), loc=where, frameon=False, fontsize=8, **style)


def save_picture(options, name, picture):
    """Writes a matplotlib figure as PNG and SVG into the workdir; returns the Markdown of it."""
    options.workdir.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        write_picture(picture, options.workdir / f"{name}.{kind}")
        picture.set_layout_engine("none")  # it is laid out
    return f"![{name}]({name}.png)"


def write_report(
    options, text, *tables, pictures=None, results=None, curves=None, runs=None, records=None
):
    """Writes report.md, records.jsonl and the pictures, each as PNG and SVG, into the workdir.

    Args:
      options: of `orthojax reproduce`.
      text: Markdown, a docstring: its first line is the heading, the others end the report.
      *tables: Markdown.
      pictures: name -> matplotlib figure; they come before the tables.
      results: the records of every arm, of which the curves are.
      curves: name -> place, see `curve`: what pictures are drawn of, to four digits, for
        curves.jsonl.
      runs: the directory that the runs are in; None is the workdir.
      records: dictionaries, of what trains nothing; None is the records of all runs, those of
        searches too.
    """
    workdir, runs = options.workdir, runs or options.workdir
    workdir.mkdir(parents=True, exist_ok=True)
    heading, *paragraphs = inspect.cleandoc(text).split("\n\n")
    facts = {**environment(), "preset": options.preset, "seeds": ", ".join(map(str, options.seeds))}
    about = "; ".join(f"{name}: {value}" for name, value in facts.items())
    parts = [f"# {heading.rstrip('.')}", f"{about}; ± is the standard deviation over them."]
    parts += [save_picture(options, *named) for named in (pictures or {}).items()]
    parts += [*tables, *(" ".join(paragraph.split()) for paragraph in paragraphs)]
    written = "\n\n".join([*parts, ""])
    write_atomic(workdir / "report.md", written.encode(errors="backslashreplace"))
    _write_lines(workdir / "records.jsonl", _records(runs) if records is None else records)
    if curves:
        lines = []
        for name, place in curves.items():
            for record in (record for records in results.values() for record in records):
                steps, values = curve(record, *place)
                run = str(record["workdir"].relative_to(runs))
                values = [float(f"{value:.4g}") for value in values]
                lines.append({"run": run, "curve": name, "steps": steps, "values": values})
        _write_lines(workdir / "curves.jsonl", lines)


def _records(runs):
    return [
        {"run": str(path.parent.relative_to(runs)), **json.loads(path.read_bytes())}
        for path in sorted(runs.rglob(RECORD))
    ]


def _write_lines(path, records):
    write_atomic(path, "".join(json.dumps(record) + "\n" for record in records).encode())
