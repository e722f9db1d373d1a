"""Figures 2 to 6: nets that are trained once, whichever figure asks first; and their pictures."""

import functools
import inspect
import statistics

from orthojax import data
from orthojax.errors import DatasetError
from orthojax.experiments import arms
from orthojax.experiments.filters import first_kernel, picture_of_filters
from orthojax.experiments.report import Line, accuracy, draw, lines_of, table, write_report
from orthojax.experiments.sweep import over_seeds
from orthojax.ortho import mean_correlation
from orthojax.storage.metrics import read_metrics

PERCENT = "test accuracy (%)"
PROTOCOL = """CIFAR-10 by the paper's protocol (preset `full`), or at 16×16, width 8, 3,000 steps of
128 images at a rate of 0.02, divided by ten at half and at three quarters, λ = 0.011, so that λ Σ η
is the paper's."""
# Name -> what a picture calls it, depth and method.
NETS = {
    "plain44_ortho": ("plain-44, orthonormal", 44, "paper"),
    "plain44_l2": ("plain-44, He and L2", 44, "baseline"),
    "plain44_isometric": ("plain-44, near-isometric", 44, "near_isometric"),
    "resnet44_l2": ("ResNet-44, He and L2", 44, "baseline"),
    "resnet110_ortho": ("ResNet-110, orthonormal", 110, "paper"),
    "resnet110_l2": ("ResNet-110, He and L2", 110, "baseline"),
    "imagenet34_ortho": ("ResNet-34, orthonormal", 34, "paper"),
    "imagenet34_l2": ("ResNet-34, He and L2", 34, "baseline"),
    "imagenet101_ortho": ("ResNet-101, orthonormal", 101, "paper"),
    "imagenet101_l2": ("ResNet-101, He and L2", 101, "baseline"),
}
PHOTOGRAPHS = "ImageNet, residual"
# Figure -> panel -> nets.
FIGURES = {
    **dict.fromkeys(("figure2", "figure3", "figure4"), {"": ("plain44_l2", "plain44_ortho")}),
    "figure5": {
        "CIFAR-10, 44 layers": ("plain44_ortho", "plain44_l2", "resnet44_l2", "plain44_isometric"),
        "CIFAR-10, residual": ("resnet110_ortho", "resnet110_l2"),
        PHOTOGRAPHS: tuple(name for name in NETS if name.startswith("imagenet")),
    },
    "figure6": {
        PHOTOGRAPHS: ("imagenet34_l2", "imagenet34_ortho"),
        "CIFAR-10, residual": ("resnet110_l2", "resnet110_ortho"),
    },
}
CORRELATIONS = {
    "correlation": "Eq. 8 as printed",
    "correlation_off_diagonal": "without the diagonal",
    "correlation_absolute": "without the diagonal, absolute values",
}
PRINTED_STEPS = (200, 2_000, 20_000, 30_000)  # of 64,000


def config(options, name):
    """Of a net. The plain ones have no modulation, as in section 5.2, but sites that measure."""
    _, depth, method = NETS[name]
    if name.startswith("imagenet"):
        return arms.imagenet(options, depth, method)
    net = {"model.name": "ResNet", **arms.UNMODULATED}
    if name.startswith("plain"):
        net = {"modulation": {"tolerance": 1e30}}
    run = {"optimizer.learning_rate": 0.1, "observe_every": 50, "eval_every": 1_000}
    short = {"optimizer.learning_rate": 0.02, "observe_every": 10, "eval_every": 300}
    run |= {"steps": 3_000, **short} if options.preset == "cpu" else {}
    made = arms.cifar10(options, depth, method, net, run)
    made.regularizer.coefficient = arms.coefficient(made)
    return made


def jobs(options):
    """The nets of a figure; of the few steps on photographs, only the first seed."""
    found = {}
    for name in dict.fromkeys(sum(_panels(options).values(), ())):
        few = name.startswith("imagenet") and options.preset == "cpu"
        seeds = options.seeds[:1] if few else options.seeds
        found[name] = over_seeds(config(options, name), shared_runs(options) / name, seeds)
    return found


def shared_runs(options):
    """The directory that the runs of all figures are in."""
    return options.workdir.parent / f"curves_{options.preset}"


def _panels(options, names=NETS):
    """Panel -> nets, those of the names; without ImageNet's where that is not prepared."""
    panels = {
        title: tuple(net for net in nets if net in names)
        for title, nets in FIGURES[options.name].items()
        if title != PHOTOGRAPHS or without_imagenet(options) is None
    }
    return {title: nets for title, nets in panels.items() if nets}


@functools.cache  # one answer for the jobs and the report
def without_imagenet(options):
    """Why ImageNet cannot be trained on here, or None: no program can download it."""
    try:
        data.load("imagenet2012", options.data_dir)
    except DatasetError as error:
        return str(error)
    return None


def report(options, results):
    """A figure's pictures and what is read off them."""
    draw_figure = DRAWN[options.name]
    panels = {
        title: {NETS[net][0]: results[net] for net in nets}
        for title, nets in _panels(options, results).items()
    }
    found, *tables = draw_figure(options, panels)
    pictures = found if isinstance(found, dict) else {options.name: found}
    text = f"{inspect.getdoc(draw_figure)}\n\n{PROTOCOL}"
    write_report(options, text, *tables, pictures=pictures, runs=shared_runs(options))


def _layers(nets, first_step=0):
    """Net, seed and what each run has measured in its layers, from the images to the logits."""
    found = []
    for net, seed, record in ((n, seed, r) for n, rs in nets.items() for seed, r in enumerate(rs)):
        measured = read_metrics(record["workdir"])
        layers = [m for m in measured if m["kind"] == "layers" and m["step"] >= first_step]
        found += [(net, seed, layers)] if layers else []
    return found


def _figure2(options, panels):
    """Figure 2: mean correlation between filters against training steps.

    The paper: about 0.006 with orthonormality, 2.5 times that with L2, after 64,000 steps. As
    printed Eq. 8 counts every filter with itself, so that for orthonormal kernels it is the sum of
    their columns over the number of pairs, 0.041 at 44 layers with 16, 32 and 64 channels and 0.081
    with 8, 16 and 32; and signs cancel. So the paper's 0.006 is not the mean of what it prints.
    """
    drawn, rows, nets = [], [], panels[""]
    for key, label in CORRELATIONS.items():
        axes = {"title": label, "xlabel": "training step", "ylabel": "mean cosine"}
        drawn.append((lines_of(nets, "layers", key), axes))
        for net, seed, layers in _layers(nets):
            ends = (layers[0][key], layers[len(layers) // 2][key], layers[-1][key])
            rows.append([label, net, seed, *(f"{value:.4f}" for value in ends)])
    headings = ["correlation", "net", "seed", "first", "middle", "last"]
    return draw(*drawn, width=4), table(headings, rows)


def _figure3(options, panels):
    """Figure 3: second moment of the error at the first layer over the last layer's.

    Of the error at the outputs of the first and the last convolution, but for the first five steps;
    enlarged, the half before the learning rate falls. The paper: less than 1 but for the first
    iterations, and ten times larger with orthonormality.
    """
    whole, enlarged, rows = [], [], []
    for net, seed, layers in _layers(panels[""], first_step=5):
        steps = [m["step"] for m in layers]
        ratios = [m["second_moment"][0] / m["second_moment"][-1] for m in layers]
        half = sum(step <= steps[-1] / 2 for step in steps) or 1
        whole.append(Line(net, steps, ratios))
        enlarged.append(Line(net, steps[:half], ratios[:half]))
        parts = (ratios[:half], ratios[-20:])
        means = [statistics.geometric_mean(max(r, 1e-300) for r in part) for part in parts]
        rows.append([net, seed, *(f"{mean:.2g}" for mean in means)])
    axes = {"xlabel": "training step", "ylabel": "first / last layer", "yscale": "log"}
    picture = draw((whole, axes), (enlarged, {"title": "before the learning rate falls", **axes}))
    headings = ["net", "seed", "geometric mean, first half", "of the last 20 records"]
    return picture, table(headings, rows)


def _figure4(options, panels):
    """Figure 4: second moment of the error in each layer, relative to the last, at a few steps.

    The paper's steps, scaled to the length of the run; the first seed. The paper's profile settles
    after 2,000 to 3,000 of 64,000 steps.
    """
    drawn, rows = [], []
    for net, _, found in _layers({net: records[:1] for net, records in panels[""].items()}):
        lines = []
        for printed in PRINTED_STEPS:
            wanted = printed / 64_000 * found[-1]["step"]
            chosen = min(found, key=lambda m, wanted=wanted: abs(m["step"] - wanted))
            step, moments = chosen["step"], chosen["second_moment"]
            profile = [moment / moments[-1] for moment in moments]
            label = f"step {step:,} (the paper's {printed:,})"
            lines.append(Line(label, range(1, len(profile) + 1), profile))
            rows.append([net, step, *(f"{profile[at]:.2g}" for at in (0, len(profile) // 2))])
        axes = {"title": net, "xlabel": "layer", "ylabel": "relative to the last"}
        drawn.append((lines, {**axes, "yscale": "log"}))
    return draw(*drawn, sharey=True), table(["net", "step", "first layer", "middle layer"], rows)


def _figure5(options, panels):
    """Figure 5: plain and residual nets against training steps.

    The experiments `gap` and `long_run` compare nets each at a rate of its own. The training loss
    is the mean over the last tenth of the steps. ImageNet: the paper's protocol, or, in the preset
    `cpu`, width 16, 64×64 crops, 150 steps of 20 images, which shows that it runs and no more. Its
    panel then has the training loss (ln 1,000 is 6.9); so few images teach nothing about others,
    and the test accuracy is chance.
    """
    drawn, rows = [], []
    for title, nets in panels.items():
        mini = title == PHOTOGRAPHS and options.preset == "cpu"
        place, label = (("train", "loss"), "training loss") if mini else (("test",), PERCENT)
        axes = {"title": title, "xlabel": "training step", "ylabel": label}
        drawn.append((lines_of(nets, *place, marker="o", markersize=3), axes))
        for net, records in nets.items():
            losses = ", ".join(f"{record['train_loss']:.2f}" for record in records)
            rows.append([title, net, accuracy(records), losses])
    headings = ["panel", "net", PERCENT, "training loss, each seed"]
    return draw(*drawn), table(headings, rows), *_about_imagenet(options)


def _figure6(options, panels):
    """Figure 6: first-layer filters.

    Of the first seed. The paper shows 64 filters of 7×7 of ResNet-34, trained on ImageNet.
    """
    pictures, rows = {}, []
    for title, nets in panels.items():
        dataset, kernels = "imagenet" if title == PHOTOGRAPHS else "cifar10", {}
        for net, records in nets.items():
            found = [first_kernel(record["workdir"]) for record in records]
            kernels[net], size = found[0], "×".join(map(str, found[0].shape[:2]))
            told = ", ".join(
                f"{mean_correlation({'kernel': each}, diagonal=False, absolute=True):.3f}"
                for each in found
            )
            rows.append([dataset, size, found[0].shape[3], net, told])
        pictures[f"figure6_{dataset}"] = picture_of_filters(kernels)
    headings = ["data", "filters", "n", "net", "mean absolute cosine, each seed"]
    return pictures, table(headings, rows), *_about_imagenet(options)


def _about_imagenet(options):
    missing = without_imagenet(options)
    return [] if missing is None else [f"ImageNet is left out: {missing}"]


DRAWN = dict(zip(FIGURES, (_figure2, _figure3, _figure4, _figure5, _figure6), strict=True))
