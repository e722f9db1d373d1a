"""Plain against residual: the same depth, width, data, schedule and number of steps."""

from experiments.arms import LADDER, cifar10, digits
from orthojax.sweep import tuned

TITLE = "Plain nets and their residual twins"
DEPTHS = (44, 110)
METHODS = ("isometric", "residual")


def jobs(options):
    """Each arm at a learning rate of its own."""
    found = {}
    for depth in DEPTHS:
        for method in METHODS:
            config = cifar10(depth, method, options.preset, options.data_dir)
            steps = config.steps // 4 if options.preset == "cpu" else config.steps // 16
            directory = options.workdir / f"cifar10_{method}{depth}"
            found[f"cifar10,{method},{depth}"] = tuned(
                config, directory, options.seeds, rates=LADDER, start=0.02, search_steps=steps
            )
    for depth in DEPTHS:
        for method in METHODS:
            directory = options.workdir / f"digits_{method}{depth}"
            found[f"digits,{method},{depth}"] = tuned(
                digits(depth, method), directory, options.seeds, rates=LADDER, start=0.01
            )
    return found
