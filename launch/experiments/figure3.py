"""Figure 3: how much of the error arrives at the first layer, during training."""

from orthojax.experiments import curves
from orthojax.experiments.report import table, write_report
from orthojax.pictures.picture import COLORS, clear_frame, new_picture

TITLE = "Figure 3: second moment of the error at the first layer over the last layer's"
ARMS = ("plain44_l2", "plain44_ortho")


def jobs(options):
    """Two plain nets of 44 layers."""
    return curves.jobs(options, *ARMS)


def report(options, results):
    """All steps but the first five, and the part before the learning rate falls, enlarged."""
    picture, rows = new_picture(9, 3.6), []
    panels = picture.subplots(1, 2)
    for name, color in zip(ARMS, COLORS[2::-2], strict=True):
        for seed, records in enumerate(curves.measurements(options, name, "layers")):
            moments = [(r["step"], r["second_moment"]) for r in records if r["step"] >= 5]
            ratios = [(step, layers[0] / layers[-1]) for step, layers in moments]
            fall = ratios[-1][0] / 2
            parts = (ratios, [pair for pair in ratios if pair[0] <= fall])
            for axes, part in zip(panels, parts, strict=True):
                label = curves.TITLES[name] if seed == 0 else None
                axes.plot(*zip(*part, strict=True), color=color, label=label, linewidth=1)
            means = [_geometric_mean([v for _, v in half]) for half in (parts[1], ratios[-20:])]
            rows.append([curves.TITLES[name], seed, *(f"{mean:.2g}" for mean in means)])
    for axes, title in zip(panels, ("all steps", "before the learning rate falls"), strict=True):
        axes.set(title=title, xlabel="training step", ylabel="first / last layer", yscale="log")
        clear_frame(axes)
    panels[0].legend(frameon=False, fontsize=8)
    write_report(
        options,
        TITLE,
        table(["net", "seed", "geometric mean, first half", "of the last 20 records"], rows),
        curves.about(options),
        "Of the error at the outputs of the first and the last convolution. The paper: less than 1 "
        "but for the first iterations, and ten times larger with orthonormality.",
        pictures={"figure3": picture},
        runs=curves.shared(options).workdir,
    )


def _geometric_mean(values):
    product = 1.0
    for value in values:
        product *= max(value, 1e-300) ** (1 / len(values))
    return product
