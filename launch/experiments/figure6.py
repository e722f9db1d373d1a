"""Figure 6: the filters of the first layer."""

from orthojax.experiments import curves
from orthojax.experiments.filters import draw_filters, first_kernel
from orthojax.experiments.report import table, write_report
from orthojax.ortho import mean_correlation

TITLE = "Figure 6: first-layer filters"


def pairs(options):
    """Data set -> two arms; ImageNet, which the paper has, only where that is prepared."""
    found = {}
    if curves.without_imagenet(options) is None:
        found["imagenet"] = ("imagenet34_l2", "imagenet34_ortho")
    found["cifar10"] = tuple(reversed(curves.RESNETS))
    return found


def jobs(options):
    """Two residual nets for each data set."""
    return curves.jobs(options, *sum(pairs(options).values(), ()))


def report(options, results):
    """The filters of the first seed, and how alike those of each are."""
    place = curves.shared(options)
    pictures, rows = [], []
    options.workdir.mkdir(parents=True, exist_ok=True)
    for dataset, names in curves.done(pairs(options), results).items():
        kernels = {}
        for name in names:
            workdirs = [path.parent for path in (place.workdir / name).glob("*/record.json")]
            found = [first_kernel(workdir) for workdir in sorted(workdirs)]
            kernels[curves.TITLES[name]] = kernel = found[0]
            values = [
                mean_correlation({"kernel": each}, diagonal=False, absolute=True) for each in found
            ]
            size = "×".join(map(str, kernel.shape[:2]))
            told = ", ".join(f"{value:.3f}" for value in values)
            rows.append([dataset, size, kernel.shape[3], curves.TITLES[name], told])
        for kind in ("png", "svg"):
            draw_filters(kernels, options.workdir / f"figure6_{dataset}.{kind}")
        pictures.append(f"![{dataset}](figure6_{dataset}.png)")
    missing = curves.without_imagenet(options)
    about = "The paper shows 64 filters of 7×7 of ResNet-34, trained on ImageNet."
    write_report(
        options,
        TITLE,
        *pictures,
        curves.about(options),
        table(["data", "filters", "n", "net", "mean absolute cosine, each seed"], rows),
        about if missing is None else f"{about} ImageNet is left out here: {missing}",
        runs=place.workdir,
    )
