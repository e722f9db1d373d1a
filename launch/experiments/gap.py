"""Plain nets and their residual twins: the same depth, width, data, schedule and steps.

Test accuracy in %, and plain minus residual. Each arm has the learning rate with the smallest
training loss, on a ladder of two or three to a factor of ten. On CIFAR-10 the search takes runs of
a part of the length, a quarter in the preset `cpu` and a sixteenth in `full`, and of twice that for
ResNet-110, which has not begun to learn by then. Clipped: gradients to a norm of 1, and BN
statistics of one pass over 1,280 training images.
"""

import itertools

from orthojax.experiments import arms
from orthojax.experiments.report import accuracy_at, bars, percent, spread, table, write_report
from orthojax.experiments.sweep import tuned

DEPTHS = (44, 110)
METHODS = {"near_isometric": "plain, isometric", "residual": "residual, He + L2"}
# Data -> changes of a config of CIFAR-10, and where the search begins; None: at the config's rate.
CIFAR10 = {"cifar10": ({}, None), "cifar10 clipped": (arms.CLIPPED, 0.1)}


def jobs(options):
    """(data, method, depth) -> job, each at a learning rate of its own."""
    found = {}
    for name, depth, method in itertools.product(CIFAR10, DEPTHS, METHODS):
        changes, start = CIFAR10[name]
        config = arms.cifar10(options, depth, method, changes)
        steps = config.steps // (4 if options.preset == "cpu" else 16)
        found[name, method, depth] = tuned(
            config,
            *options.arm(name, f"{method}{depth}"),
            start=start,
            search_steps=steps * (2 if (method, depth) == ("residual", 110) else 1),
        )
    for depth, method in itertools.product(DEPTHS, METHODS):
        place = options.arm(f"digits_{method}{depth}")
        found["digits", method, depth] = tuned(arms.digits(depth, method), *place, start=0.01)
    return found


def report(options, results):
    """The gap of every pair, seed by seed, and bars."""
    rows, pairs = [], {}
    for data, depth in sorted({(data, depth) for data, _, depth in results}):
        twins = {name: results.get((data, method, depth)) for method, name in METHODS.items()}
        if None in twins.values():
            continue
        pairs[f"{data}, {depth} layers"] = twins
        plain, residual = twins.values()
        gaps = [a - b for a, b in zip(percent(plain), percent(residual), strict=True)]
        cells = accuracy_at(plain), accuracy_at(residual), spread(gaps, "+"), len(gaps)
        rows.append([data, depth, *cells])
    written = table(["data", "layers", *METHODS.values(), "gap", "n"], rows)
    pictures = {"gap": bars({"": pairs})} if pairs else {}
    write_report(options, __doc__, written, pictures=pictures)
