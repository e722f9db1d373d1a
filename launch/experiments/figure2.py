"""Figure 2: correlation between the columns of a kernel during training."""

from orthojax.experiments import curves
from orthojax.experiments.report import table, write_report
from orthojax.pictures.picture import COLORS, clear_frame, new_picture

TITLE = "Figure 2: mean correlation between filters against training steps"
ARMS = ("plain44_l2", "plain44_ortho")
KINDS = {
    "correlation": "Eq. 8 as printed",
    "correlation_off_diagonal": "without the diagonal",
    "correlation_absolute": "without the diagonal, absolute values",
}


def jobs(options):
    """Two plain nets of 44 layers."""
    return curves.jobs(options, *ARMS)


def report(options, results):
    """Three panels: as printed, and what it hides."""
    picture, rows = new_picture(12, 3.6), []
    panels = picture.subplots(1, len(KINDS))
    for axes, (key, label) in zip(panels, KINDS.items(), strict=True):
        for name, color in zip(ARMS, COLORS[2::-2], strict=True):
            for seed, records in enumerate(curves.measurements(options, name, "layers")):
                steps = [record["step"] for record in records]
                values = [record[key] for record in records]
                title = curves.TITLES[name] if seed == 0 else None
                axes.plot(steps, values, color=color, label=title, linewidth=1.2)
                ends = (values[0], values[len(values) // 2], values[-1])
                rows.append([label, curves.TITLES[name], seed, *(f"{v:.4f}" for v in ends)])
        axes.set(title=label, xlabel="training step", ylabel="mean cosine")
        clear_frame(axes)
    panels[0].legend(frameon=False, fontsize=8)
    write_report(
        options,
        TITLE,
        table(["correlation", "net", "seed", "first", "middle", "last"], rows),
        curves.about(options),
        "The paper: about 0.006 with orthonormality, 2.5 times that with L2, after 64,000 steps. "
        "As printed Eq. 8 counts every filter with itself, so that for orthonormal kernels it is "
        "the sum of their columns over the number of pairs, 0.041 at 44 layers with 16, 32 and 64 "
        "channels and 0.081 with 8, 16 and 32; and signs cancel. So the paper's 0.006 is not the "
        "mean of what it prints.",
        pictures={"figure2": picture},
        runs=curves.shared(options).workdir,
    )
