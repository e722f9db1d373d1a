"""Plain against residual: the same depth, width, data, schedule and number of steps."""

import itertools
import statistics

from orthojax.experiments.arms import LADDER, cifar10, clip, digits, folder
from orthojax.experiments.report import accuracy, table, write_report
from orthojax.experiments.sweep import tuned
from orthojax.pictures.picture import COLORS, clear_frame, new_picture

TITLE = "Plain nets and their residual twins"
DEPTHS = (44, 110)
METHODS = ("near_isometric", "residual")
CLIPPED = "cifar10 clipped"


def jobs(options):
    """Each arm at a learning rate of its own."""
    found = {}
    for clipped, depth, method in itertools.product((False, True), DEPTHS, METHODS):
        config = cifar10(depth, method, options.preset, options.data_dir)
        steps = config.steps // (4 if options.preset == "cpu" else 16)
        if (method, depth) == ("residual", 110):
            steps *= 2  # after as many as the others take it has not begun to learn
        start, name = config.optimizer.learning_rate, "cifar10"
        if clipped:
            clip(config)
            start, name = 0.1, CLIPPED
        found[f"{name},{method},{depth}"] = tuned(
            config,
            options.workdir / folder(name, f"{method}{depth}"),
            options.seeds,
            rates=LADDER,
            start=start,
            search_steps=steps,
        )
    for depth in DEPTHS:
        for method in METHODS:
            directory = options.workdir / f"digits_{method}{depth}"
            found[f"digits,{method},{depth}"] = tuned(
                digits(depth, method), directory, options.seeds, rates=LADDER, start=0.01
            )
    return found


def report(options, results):
    """The gap of every pair, seed by seed, and bars."""
    rows = []
    pairs = sorted({(dataset, depth) for dataset, _, depth in map(_parts, results)})
    for dataset, depth in pairs:
        plain, residual = (results[f"{dataset},{method},{depth}"] for method in METHODS)
        gaps = [
            100 * (a["test_accuracy"] - b["test_accuracy"])
            for a, b in zip(plain, residual, strict=True)
        ]
        spread = f" ± {statistics.stdev(gaps):.2f}" if len(gaps) > 1 else ""
        cells = [f"{accuracy(r)} (at {r[0]['learning_rate']:g})" for r in (plain, residual)]
        rows.append([dataset, depth, *cells, f"{statistics.fmean(gaps):+.2f}{spread}", len(gaps)])
    write_report(
        options,
        TITLE,
        table(["data", "layers", "plain, isometric", "residual, He + L2", "gap", "n"], rows),
        "Test accuracy in %, and plain minus residual. Each arm at the learning rate with the "
        "smallest training loss, on a ladder of two or three to a factor of ten; on CIFAR-10 the "
        "search takes runs of a quarter of the length (of half for ResNet-110, which has not begun "
        "to learn after a quarter). Clipped: gradients to a norm of 1, and BN statistics of one "
        f"pass over 1,280 training images. Preset `{options.preset}`.",
        pictures={"gap": _draw(results, pairs)},
    )


def _parts(name):
    dataset, method, depth = name.split(",")
    return dataset, method, int(depth)


def _draw(results, pairs):
    picture = new_picture(7.5, 3.6)
    axes = picture.subplots()
    for shift, method, color in zip((-0.2, 0.2), METHODS, COLORS, strict=False):
        for place, (dataset, depth) in enumerate(pairs):
            values = [100 * r["test_accuracy"] for r in results[f"{dataset},{method},{depth}"]]
            label = None if place else {"near_isometric": "plain", "residual": "residual"}[method]
            mean = statistics.fmean(values)
            axes.bar(place + shift, mean, 0.38, color=color, label=label)
            axes.plot([place + shift] * len(values), values, "k.", markersize=4)
    axes.set_xticks(range(len(pairs)), [f"{dataset}\n{depth} layers" for dataset, depth in pairs])
    axes.set(ylabel="test accuracy (%)", ylim=(0, 100))
    clear_frame(axes)
    axes.legend(frameon=False)
    return picture
