"""Table 2: one-order methods against orthonormality and modulation, at 44 and 110 layers.

The paper gives all methods one learning rate, 0.1, and clips nothing. That column is here, and
another in which each method has a rate of its own and clipped gradients. Rows more: modulation
throughout, modulation where the error outgrows a budget, and near-isometric initialization with
that and without.
"""

import copy
import statistics

from orthojax.experiments.arms import LADDER, cifar10, clip, digits
from orthojax.experiments.report import accuracy, table, write_report
from orthojax.experiments.sweep import over_seeds, tuned
from orthojax.pictures.picture import COLORS, clear_frame, new_picture

TITLE = "Table 2: one-order methods at 44 and 110 layers"
DEPTHS = (44, 110)
SHARED_RATE = 0.1
STEPS = 3_000  # on the digits
# Of the search for rates. At 110 layers 300 steps tell nothing: most stay at chance, at any rate.
SEARCH_STEPS = {"cpu": {44: 300, 110: STEPS}, "full": dict.fromkeys(DEPTHS, 4_000)}

# Name -> optimizer without its rate, where its own search begins, the paper's figures in %.
RIVALS = {
    "Nesterov": ({"name": "sgd", "momentum": 0.9, "nesterov": True}, 0.05, (85.0, 10.18)),
    "AdaGrad": ({"name": "adagrad"}, 0.1, (77.86, 30.3)),
    "AdaDelta": ({"name": "adadelta"}, 1.0, (48.73, 25.6)),
    "Adam": ({"name": "adam"}, 0.002, (39.85, 10.0)),
    "RMSProp": ({"name": "rmsprop"}, 0.002, (10.0, 10.0)),
    "SGD": ({"name": "sgd", "momentum": 0.9}, 0.05, (84.14, 11.83)),
}
# Name -> method of the config, modulation (`first`: of the first 4 % of the steps; a number:
# throughout, to that tolerance; None), its own rate's start, the paper's figures.
OURS = {
    "the paper's": ("paper", "first", 0.05, (88.42, 81.6)),
    "the paper's, modulated throughout": ("paper", 1.0, 0.05, (None, 73.5)),
    "the paper's, modulated as needed": ("paper", 10.0, 0.05, (None, None)),
    "near-isometric": ("near_isometric", None, 0.05, (None, None)),
    "near-isometric, modulated as needed": ("near_isometric", 10.0, 0.05, (None, None)),
}


def arms(options):
    """(method, depth) -> its config and where the search for its rate begins."""

    def config(depth, method):
        if options.preset == "cpu":
            return digits(depth, method, STEPS)
        return cifar10(depth, method, "full", options.data_dir)

    found = {}
    for depth in DEPTHS:
        for name, (optimizer, start, _) in RIVALS.items():
            rival = config(depth, "baseline")
            rival.optimizer = {**optimizer, "learning_rate": SHARED_RATE}
            found[name, depth] = rival, start
        for name, (method, modulated, start, _) in OURS.items():
            own = config(depth, method)
            with own.ignore_type():
                if modulated is None:
                    own.modulation = None
                elif modulated != "first":
                    own.modulation.steps, own.modulation.tolerance = None, modulated
            own.optimizer.learning_rate = SHARED_RATE
            found[name, depth] = own, start
    return found


def jobs(options):
    """Every arm at the shared rate and at its own."""
    found = {}
    for (name, depth), (config, start) in arms(options).items():
        directory = options.workdir / f"{name.replace(' ', '_')}_{depth}"
        found[name, depth, "shared"] = over_seeds(config, directory / "shared", options.seeds)
        own = copy.deepcopy(config)
        clip(own)
        found[name, depth, "own"] = tuned(
            own,
            directory / "own",
            options.seeds,
            rates=LADDER,
            start=start,
            search_steps=SEARCH_STEPS[options.preset][depth],
        )
    return found


def report(options, results):
    """The table, and bars."""
    depths = [depth for depth in DEPTHS if any(arm[1] == depth for arm in results)]
    papers = {**{n: r[2] for n, r in RIVALS.items()}, **{n: o[3] for n, o in OURS.items()}}
    rows = []
    for name, paper in papers.items():
        row = [name]
        for depth in depths:
            printed = paper[DEPTHS.index(depth)]
            shared, own = (results.get((name, depth, kind)) for kind in ("shared", "own"))
            row += [
                "-" if printed is None else f"{printed:g}",
                accuracy(shared) if shared else "not run",
                f"{accuracy(own)} (at {own[0]['learning_rate']:g})" if own else "not run",
            ]
        rows.append(row)
    headings = ["method"]
    for depth in depths:
        headings += [f"{depth} layers: paper, CIFAR-10", f"here, at {SHARED_RATE:g}", "own rate"]
    cpu = options.preset == "cpu"
    where = f"the digits, width 8, {STEPS:,} steps" if cpu else "CIFAR-10, 64k steps"
    searched = " and ".join(
        f"{steps:,} steps at {depth} layers"
        for depth, steps in SEARCH_STEPS[options.preset].items()
        if depth in depths
    )
    write_report(
        options,
        TITLE,
        table(headings, rows),
        f"Test accuracy in %, on {where}. The rivals start from He initialization and have L2. "
        "The paper's method modulates the first 4 % of the steps; throughout, it holds every error "
        "at the size of the topmost one; as needed, it acts where an error differs from that by "
        "more than a factor of ten, and so ends by itself. A rate of a method's own is chosen by "
        f"the training loss of the first seed after {searched}, from a ladder; then gradients are "
        "clipped to a norm of 1, and BN statistics are those of one pass over 1,280 training "
        "images.",
        pictures={"table2": draw(results, papers, depths)},
    )


def draw(results, papers, depths):
    """A panel for each depth; bars for both rates, the paper's figures as ticks."""
    picture = new_picture(1 + 4 * len(depths), 4)
    panels = picture.subplots(1, len(depths), sharey=True, squeeze=False)[0]
    for axes, depth in zip(panels, depths, strict=True):
        for place, (name, paper) in enumerate(papers.items()):
            for shift, kind, color in ((-0.2, "shared", COLORS[5]), (0.2, "own", COLORS[0])):
                records = results.get((name, depth, kind), ())
                values = [100 * record["test_accuracy"] for record in records]
                label = {"shared": f"rate {SHARED_RATE:g}", "own": "own rate"}[kind]
                axes.barh(
                    place + shift,
                    statistics.fmean(values or [0.0]),
                    0.38,
                    color=color,
                    label=None if place else label,
                )
                axes.plot(values, [place + shift] * len(values), "k.", markersize=3)
            printed = paper[DEPTHS.index(depth)]
            if printed is not None:
                axes.plot(
                    [printed] * 2,
                    [place - 0.45, place + 0.45],
                    color=COLORS[1],
                    label=None if place else "paper, on CIFAR-10",
                )
        axes.set(title=f"{depth} layers", xlabel="test accuracy (%)", xlim=(0, 100))
        axes.set_yticks(range(len(papers)), papers)
        clear_frame(axes)
    panels[0].invert_yaxis()
    panels[-1].legend(frameon=False, fontsize=8, loc="center")
    return picture
