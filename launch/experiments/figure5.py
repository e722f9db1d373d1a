"""Figure 5: accuracy against training steps, plain and residual, on CIFAR-10 and ImageNet."""

from orthojax.experiments import curves
from orthojax.experiments.report import accuracy, table, write_report
from orthojax.pictures.picture import COLORS, clear_frame, new_picture

TITLE = "Figure 5: plain and residual nets against training steps"
PHOTOGRAPHS = "ImageNet, residual"


def panels(options):
    """Title -> arms, as in the paper; without ImageNet's where that is not prepared."""
    found = {
        "CIFAR-10, 44 layers": ("plain44_ortho", "plain44_l2", "resnet44_l2", "plain44_isometric"),
        "CIFAR-10, residual": curves.RESNETS,
    }
    if curves.without_imagenet(options) is None:
        found[PHOTOGRAPHS] = curves.IMAGENET
    return found


def jobs(options):
    """Six nets on CIFAR-10, and four on ImageNet."""
    return curves.jobs(options, *dict.fromkeys(sum(panels(options).values(), ())))


def report(options, results):
    """Panels of test accuracy, and of the training loss where accuracy would say nothing."""
    plan, rows = curves.done(panels(options), results), []
    picture = new_picture(4.5 * len(plan), 3.6)
    row = picture.subplots(1, len(plan), squeeze=False)[0]
    for axes, (title, names) in zip(row, plan.items(), strict=True):
        mini = title == PHOTOGRAPHS and options.preset == "cpu"
        for color, name in zip(COLORS, names, strict=False):
            found = curves.measurements(options, name, "train" if mini else "test")
            for seed, records in enumerate(found):
                steps = [record["step"] for record in records]
                values = [r["loss"] if mini else 100 * r["accuracy"] for r in records]
                label = curves.TITLES[name] if seed == 0 else None
                axes.plot(steps, values, color=color, label=label, marker="o", markersize=3)
            losses = [f"{record['train_loss']:.2f}" for record in results[name]]
            rows.append([title, curves.TITLES[name], accuracy(results[name]), ", ".join(losses)])
        label = "training loss" if mini else "test accuracy (%)"
        axes.set(title=title, xlabel="training step", ylabel=label)
        clear_frame(axes)
        axes.legend(frameon=False, fontsize=8)
    write_report(
        options,
        TITLE,
        table(["panel", "net", "test accuracy (%)", "training loss, each seed"], rows),
        curves.about(options),
        "The experiments `gap` and `long_run` compare nets each at a rate of its own. The training "
        "loss is the mean over the last tenth of the steps.",
        _about_imagenet(options),
        pictures={"figure5": picture},
        runs=curves.shared(options).workdir,
    )


def _about_imagenet(options):
    missing = curves.without_imagenet(options)
    if missing is not None:
        return f"The paper's third panel, ImageNet, is left out: {missing}"
    if options.preset == "cpu":
        return (
            "ImageNet: width 16, 64×64 crops, 150 steps of 20 images, which shows that it runs and "
            "no more. The panel has the training loss (ln 1,000 is 6.9); so few images teach "
            "nothing about others, and the test accuracy is chance."
        )
    return "ImageNet: the paper's protocol."
