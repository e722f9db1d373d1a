"""Figure 4: the error in every layer, relative to the top one, at a few steps of training."""

from orthojax.experiments import curves
from orthojax.experiments.report import table, write_report
from orthojax.pictures.picture import COLORS, clear_frame, new_picture

TITLE = "Figure 4: second moment of the error in each layer, relative to the last"
ARMS = ("plain44_ortho", "plain44_l2")
FRACTIONS = {200: 1 / 320, 2_000: 1 / 32, 20_000: 5 / 16, 30_000: 15 / 32}  # of 64,000


def jobs(options):
    """Two plain nets of 44 layers."""
    return curves.jobs(options, *ARMS)


def report(options, results):
    """A line for each of the paper's steps, scaled to the length of the run."""
    picture, rows = new_picture(9, 3.6), []
    for axes, name in zip(picture.subplots(1, 2, sharey=True), ARMS, strict=True):
        records = curves.measurements(options, name, "layers")[0]
        for color, (printed, fraction) in zip(COLORS, FRACTIONS.items(), strict=False):
            wanted = fraction * records[-1]["step"]
            record = min(records, key=lambda r, wanted=wanted: abs(r["step"] - wanted))
            profile = [m / record["second_moment"][-1] for m in record["second_moment"]]
            label = f"step {record['step']:,} (the paper's {printed:,})"
            layers = range(1, len(profile) + 1)
            axes.plot(layers, profile, label=label, color=color, linewidth=1.2)
            middle = profile[len(profile) // 2]
            rows.append([curves.TITLES[name], record["step"], f"{profile[0]:.2g}", f"{middle:.2g}"])
        axes.set(title=curves.TITLES[name], xlabel="layer", yscale="log")
        clear_frame(axes)
        axes.legend(frameon=False, fontsize=7)
    picture.axes[0].set_ylabel("relative to the last layer")
    write_report(
        options,
        TITLE,
        table(["net", "step", "first layer", "middle layer"], rows),
        curves.about(options),
        "The first seed. The paper's profile settles after 2,000 to 3,000 of 64,000 steps.",
        pictures={"figure4": picture},
        runs=curves.shared(options).workdir,
    )
