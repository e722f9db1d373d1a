"""Figure 6: the filters of the first layer."""

from draw_filters import first_kernel
from experiments import curves
from experiments.report import table, write_report
from orthojax.analysis.filters import draw_filters
from orthojax.ortho import mean_correlation

TITLE = "Figure 6: first-layer filters"


def jobs(options):
    """Two residual nets on CIFAR-10; the paper's are of 34 layers on ImageNet."""
    return curves.jobs(options, *curves.RESNETS[options.preset])


def report(options, results):
    """The filters of the first seed, and how alike they are."""
    place = curves.shared(options)
    kernels, rows = {}, []
    for name in curves.RESNETS[options.preset]:
        workdir = sorted((place.workdir / name).glob("*/record.json"))[0].parent
        kernels[curves.TITLES[name]] = kernel = first_kernel(workdir)
        value = mean_correlation({"kernel": kernel}, diagonal=False, absolute=True)
        rows.append([curves.TITLES[name], f"{float(value):.3f}"])
    options.workdir.mkdir(parents=True, exist_ok=True)
    for kind in ("png", "svg"):
        draw_filters(kernels, options.workdir / f"figure6.{kind}")
    write_report(
        options,
        TITLE,
        "![figure6](figure6.png)",
        table(["net", "mean absolute cosine between filters"], rows),
        "The paper shows 7×7 filters of ResNet-34 on ImageNet: train "
        "`configs/imagenet_resnet.py:method=l2` and `method=ortho`, then `launch/draw_filters.py`.",
        runs=curves.shared(options).workdir,
    )
