"""Figure 5: accuracy against training steps, plain and residual, on CIFAR-10."""

from experiments import curves
from experiments.report import accuracy, table, write_report
from orthojax.analysis.picture import COLOURS, clear_frame, new_picture

TITLE = "Figure 5: accuracy of plain and residual nets against training steps"


def panels(options):
    """Title -> arms."""
    return {
        "44 layers": ("plain44_ortho", "plain44_l2", "resnet44_l2"),
        "residual": curves.RESNETS[options.preset],
    }


def jobs(options):
    """Four or five nets on CIFAR-10."""
    return curves.jobs(options, *dict.fromkeys(sum(panels(options).values(), ())))


def report(options, results):
    """Two panels; the third of the paper is ImageNet."""
    picture, rows = new_picture(9, 3.6), []
    plan = panels(options)
    for axes, (title, names) in zip(picture.subplots(1, 2), plan.items(), strict=True):
        for colour, name in zip(COLOURS, names, strict=False):
            for seed, records in enumerate(curves.measurements(options, name, "test")):
                steps = [record["step"] for record in records]
                values = [100 * record["accuracy"] for record in records]
                label = curves.TITLES[name] if seed == 0 else None
                axes.plot(steps, values, color=colour, label=label, marker="o", markersize=3)
            rows.append([title, curves.TITLES[name], accuracy(results[name])])
        axes.set(title=title, xlabel="training step", ylabel="test accuracy (%)")
        clear_frame(axes)
        axes.legend(frameon=False, fontsize=8)
    write_report(
        options,
        TITLE,
        table(["panel", "net", "test accuracy (%)"], rows),
        f"All at learning rate {curves.RATES[options.preset]:g}; see the experiment `gap` for a "
        "comparison in which each net has its own. The paper's third panel is ImageNet: "
        "`launch/train.py --config=configs/imagenet_resnet.py:depth=34,method=ortho`, and 101, "
        "`l2`, and `launch/compare_runs.py`.",
        pictures={"figure5": picture},
        runs=curves.shared(options).workdir,
    )
