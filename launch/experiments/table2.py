"""Table 2: one-order methods against orthonormality and modulation, at 44 and 110 layers.

Test accuracy in %, on the digits, width 8, 3,000 steps (preset `full`: CIFAR-10, 64k steps). The
paper gives all methods one learning rate, 0.1, and clips nothing. That column is here, and another
in which each method has a rate of its own, gradients clipped to a norm of 1, and BN statistics of
one pass over 1,280 training images. That rate is chosen from a ladder by the training loss of the
first seed after 300 steps at 44 layers and 3,000 at 110 (4,000 at both).

The rivals start from He initialization and have L2. The paper's method modulates the first 4 % of
the steps; throughout, it holds every error at the size of the topmost one; as needed, it acts where
an error differs from that by more than a factor of ten, and so ends by itself.
"""

import itertools

from orthojax.experiments import arms
from orthojax.experiments.report import accuracy, accuracy_at, bars, table, write_report
from orthojax.experiments.sweep import over_seeds, tuned

DEPTHS = (44, 110)
SHARED_RATE = 0.1
STEPS = 3_000  # on the digits
# Of the search for rates. At 110 layers 300 steps tell nothing: most stay at chance, at any rate.
SEARCH_STEPS = {"cpu": {44: 300, 110: STEPS}, "full": dict.fromkeys(DEPTHS, 4_000)}
BARS = {"shared": f"rate {SHARED_RATE:g}", "own": "own rate"}


def rival(name, **arguments):
    """Changes: an optimizer."""
    return {"optimizer": {"name": name, "learning_rate": SHARED_RATE, **arguments}}


def modulated(tolerance):
    """Changes: modulation throughout, to a tolerance."""
    return {"modulation.steps": None, "modulation.tolerance": tolerance}


# Name -> method of the configs, changes, where the search for its own rate begins, the paper's
# figures in %.
METHODS = {
    "Nesterov": ("baseline", rival("sgd", momentum=0.9, nesterov=True), 0.05, (85.0, 10.18)),
    "AdaGrad": ("baseline", rival("adagrad"), 0.1, (77.86, 30.3)),
    "AdaDelta": ("baseline", rival("adadelta"), 1.0, (48.73, 25.6)),
    "Adam": ("baseline", rival("adam"), 0.002, (39.85, 10.0)),
    "RMSProp": ("baseline", rival("rmsprop"), 0.002, (10.0, 10.0)),
    "SGD": ("baseline", rival("sgd", momentum=0.9), 0.05, (84.14, 11.83)),
    "the paper's": ("paper", {}, 0.05, (88.42, 81.6)),
    "the paper's, modulated throughout": ("paper", modulated(1.0), 0.05, (None, 73.5)),
    "the paper's, modulated as needed": ("paper", modulated(10.0), 0.05, (None, None)),
    "near-isometric": ("near_isometric", arms.UNMODULATED, 0.05, (None, None)),
    "near-isometric, modulated as needed": ("near_isometric", modulated(10.0), 0.05, (None, None)),
}


def config(options, name, depth):
    """The config of a method at the shared rate."""
    method, changes, _, _ = METHODS[name]
    changes = {"optimizer.learning_rate": SHARED_RATE} | changes
    if options.preset == "cpu":
        return arms.digits(depth, method, changes, steps=STEPS)
    return arms.cifar10(options, depth, method, changes)


def jobs(options):
    """Every arm at the shared rate, and at its own and clipped."""
    found = {}
    for depth, name in itertools.product(DEPTHS, METHODS):
        shared = config(options, name, depth)
        directory = options.workdir / f"{name.replace(' ', '_')}_{depth}"
        found[name, depth, "shared"] = over_seeds(shared, directory / "shared", options.seeds)
        found[name, depth, "own"] = tuned(
            arms.changed(shared, arms.CLIPPED),
            directory / "own",
            options.seeds,
            start=METHODS[name][2],
            search_steps=SEARCH_STEPS[options.preset][depth],
        )
    return found


def report(options, results):
    """The table, and bars for both rates, the paper's figures as ticks."""
    depths = [depth for depth in DEPTHS if any(arm[1] == depth for arm in results)]
    headings, rows, panels, papers = ["method"], {name: [name] for name in METHODS}, {}, {}
    for depth in depths:
        headings += [f"{depth} layers: paper, CIFAR-10", f"here, at {SHARED_RATE:g}", "own rate"]
        panel, paper = panels[f"{depth} layers"], papers[f"{depth} layers"] = {}, {}
        for name, (_, _, _, printed) in METHODS.items():
            paper[name] = printed[DEPTHS.index(depth)]
            shared, own = (results.get((name, depth, kind)) for kind in BARS)
            panel[name] = {BARS["shared"]: shared or (), BARS["own"]: own or ()}
            rows[name] += [
                "-" if paper[name] is None else f"{paper[name]:g}",
                accuracy(shared) if shared else "not run",
                accuracy_at(own) if own else "not run",
            ]
    picture = bars(panels, ("paper, on CIFAR-10", papers))
    write_report(options, __doc__, table(headings, rows.values()), pictures={"table2": picture})
