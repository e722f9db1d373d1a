"""The runs behind Figures 2 to 6: each is trained once, whichever figure asks first."""

import dataclasses
import functools

from orthojax import data
from orthojax.errors import DatasetError
from orthojax.experiments.arms import cifar10, imagenet
from orthojax.experiments.sweep import over_seeds
from orthojax.storage.metrics import read_metrics

RATES = {"cpu": 0.02, "full": 0.1}  # of all arms
STEPS = 3_000  # of `cpu` on CIFAR-10
# The λ that does in so short a run what the paper's does in its own: a kernel's distance from what
# the regularizer wants decays with λ Σ η, and the rates fall at the same fractions of both runs.
COEFFICIENT = 1e-4 * (RATES["full"] * 64_000) / (RATES["cpu"] * STEPS)
RESNETS = ("resnet110_ortho", "resnet110_l2")
TITLES = {
    "plain44_ortho": "plain-44, orthonormal",
    "plain44_l2": "plain-44, He and L2",
    "plain44_isometric": "plain-44, near-isometric",
    "resnet44_l2": "ResNet-44, He and L2",
    "resnet110_ortho": "ResNet-110, orthonormal",
    "resnet110_l2": "ResNet-110, He and L2",
    "imagenet34_ortho": "ResNet-34, orthonormal",
    "imagenet34_l2": "ResNet-34, He and L2",
    "imagenet101_ortho": "ResNet-101, orthonormal",
    "imagenet101_l2": "ResNet-101, He and L2",
}
METHODS = {"ortho": "paper", "l2": "baseline", "isometric": "near_isometric"}  # by the suffix
IMAGENET = tuple(name for name in TITLES if name.startswith("imagenet"))


def shared(options):
    """The same options with the directory that all figures' runs are in."""
    return dataclasses.replace(options, workdir=options.workdir.parent / f"curves_{options.preset}")


@functools.cache  # one answer for the jobs and the report
def without_imagenet(options):
    """Why ImageNet cannot be trained on here, or None: no program can download it."""
    try:
        data.load("imagenet2012", options.data_dir)
    except DatasetError as error:
        return str(error)
    return None


def about(options):
    """A sentence for the reports: what the nets on CIFAR-10 are trained on, and how."""
    if options.preset == "full":
        return "CIFAR-10 by the paper's protocol."
    return (
        f"CIFAR-10 at 16×16, width 8, {STEPS:,} steps of 128 images at a rate of {RATES['cpu']:g}, "
        f"divided by ten at half and at three quarters; λ = {COEFFICIENT:.2g}, so that λ Σ η is "
        "the paper's."
    )


def config(options, name):
    """One arm. The plain nets have no modulation, as in section 5.2, but sites that measure."""
    net, suffix = name.split("_")
    method = METHODS[suffix]
    depth = int("".join(filter(str.isdigit, net)))
    if name in IMAGENET:
        return imagenet(depth, method, options.preset, options.data_dir)
    plain = cifar10(depth, method, options.preset, options.data_dir)
    with plain.ignore_type():
        if net.startswith("plain"):
            plain.modulation = {"tolerance": 1e30}
        else:
            plain.model.name, plain.modulation = "ResNet", None
        plain.optimizer.learning_rate = RATES[options.preset]
        plain.observe_every, plain.eval_every = 50, 1_000
        if options.preset == "cpu":
            plain.steps = STEPS
            plain.observe_every, plain.eval_every = 10, 300
            plain.regularizer.coefficient = COEFFICIENT
    return plain


def jobs(options, *names):
    """Those of the arms with these names; of the few steps on photographs, only the first seed."""
    place, found = shared(options), {}
    for name in names:
        few = name in IMAGENET and options.preset == "cpu"
        seeds = options.seeds[:1] if few else options.seeds
        found[name] = over_seeds(config(options, name), place.workdir / name, seeds)
    return found


def done(groups, results):
    """Of each group of arms those with results, which not all have where `--finished`."""
    left = {title: [n for n in names if n in results] for title, names in groups.items()}
    return {title: names for title, names in left.items() if names}


def measurements(options, name, kind):
    """For every seed the records of a kind, `layers` or `test`, of an arm that has been run."""
    place = shared(options)
    workdirs = sorted((place.workdir / name).glob("*/metrics.jsonl"))
    found = [
        [record for record in read_metrics(path.parent) if record["kind"] == kind]
        for path in workdirs
    ]
    return [records for records in found if records]
