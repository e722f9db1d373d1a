"""Evaluates a trained net on a split: top-1, top-5, every class, and a confusion picture.

orthojax evaluate --workdir=runs/cifar10_plain
orthojax evaluate --workdir=runs/cifar10_plain --split='train[:5000]'
"""

import math
import sys

from absl import flags

from orthojax.commands.command_line import define_trained, load_trained, run
from orthojax.console import printable, tell


def define_flags():
    define_trained()
    flags.DEFINE_string("split", None, "A TFDS split; that which the run was tested on by default.")
    flags.DEFINE_string("data_dir", None, "TFDS data directory; the run's by default.")
    flags.DEFINE_integer(
        "recalibrate_bn",
        None,
        "BN statistics of one pass over this many training images at once; 0 takes the running "
        "ones. The run's own choice by default.",
        lower_bound=0,
    )
    flags.DEFINE_string("output", None, "Directory of what is written; the workdir by default.")


def main():
    from orthojax import data
    from orthojax.config.sections import bind
    from orthojax.inference.evaluation import evaluate
    from orthojax.pictures.picture import write_picture
    from orthojax.storage.paths import output_directory, to_path
    from orthojax.storage.workdir import CONFIG, read_run_file, write_json_atomic

    options = flags.FLAGS
    classifier = load_trained()
    files = ("evaluation.json", "confusion.png")
    output = output_directory(options.output or options.workdir, *files)
    config = read_run_file(to_path(options.workdir), CONFIG)
    section = dict(config["dataset"])
    section.pop("cache_dir", None)  # a run does not say where this program writes
    for key, value in (("test_split", options.split), ("data_dir", options.data_dir)):
        if value is not None:
            section[key] = value
    dataset = bind(data.implementation(section), section, "dataset")
    size = options.recalibrate_bn
    size = config.get("recalibrate_bn", 0) if size is None else size
    if size:
        with_statistics = dataset.train_batches(size, config["seed"])
        classifier = classifier.recalibrated(next(with_statistics)["image"])
        with_statistics.close()
    names = dataset.preprocessing.class_names
    found = evaluate(classifier, dataset.test_batches(config["batch_size"]), names)

    about = {"step": classifier.step, "split": section.get("test_split"), "recalibrate_bn": size}
    about["chosen_by"] = "validation" if options.step == "best" else None
    write_json_atomic(output / files[0], {**about, **found.to_json()})
    write_picture(found.draw(), output / files[1])
    chosen = ", chosen by the validation split" if about["chosen_by"] else ""
    split = "the test split" if options.split is None else f"split {printable(options.split)}"
    show(found, f"step {classifier.step:,}{chosen}", split)
    tell(f"\nwritten to {output}: {', '.join(files)}", sys.stdout)


def show(found, step, split):
    tell(f"{step}, {found.confusion.sum():,} images of {split}", sys.stdout)
    tell(f"top-1 {found.accuracy:.2%}  top-5 {found.top5_accuracy:.2%}", sys.stdout)
    tell(f"loss  {found.loss:.4f}\n", sys.stdout)
    names = [*map(printable, found.class_names)]
    width = max(map(len, names))
    for name, value in zip(names, found.class_accuracies, strict=True):
        told = "no image" if math.isnan(value) else f"{value:.1%}"
        tell(f"{name:>{width}}  {told}", sys.stdout)


def start():
    run(define_flags, main)


if __name__ == "__main__":
    start()
