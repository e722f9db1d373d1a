"""Writes a trained net as one StableHLO file that JAX runs without this project.

orthojax export --workdir=runs/cifar10_plain --fold_bn net.stablehlo
"""

import sys

from absl import flags

from orthojax.commands.command_line import define_trained, load_trained, run
from orthojax.console import tell


def define_flags():
    define_trained()
    flags.DEFINE_bool("fold_bn", False, "Fold batch normalization into the convolutions.")


def main(paths):
    from orthojax.errors import UserError
    from orthojax.inference.export import check_export, export

    options = flags.FLAGS
    if len(paths) != 1:
        raise UserError("name the file: orthojax export --workdir=DIR net.stablehlo")
    check_export(paths[0])
    classifier = load_trained()
    if options.fold_bn:
        classifier = classifier.folded()
    export(classifier, paths[0])
    shape = ", ".join(map(str, classifier.preprocessing.image_shape))
    tell(
        f"written to {paths[0]}: step {classifier.step:,}; uint8 (N, {shape}) to float32 "
        f"(N, {len(classifier.class_names)})",
        sys.stdout,
    )


def start():
    run(define_flags, main, arguments="FILE")


if __name__ == "__main__":
    start()
