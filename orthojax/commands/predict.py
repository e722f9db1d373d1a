"""Says what a trained net sees in pictures.

orthojax predict --workdir=runs/cifar10_plain cat.jpg dog.png
"""

import sys

from absl import flags

from orthojax.commands.command_line import define_trained, load_trained, run
from orthojax.console import printable, tell


def define_flags():
    define_trained()
    flags.DEFINE_integer("top", 3, "How many classes to name for each picture.", lower_bound=1)


def main(paths):
    from orthojax.errors import UserError

    options = flags.FLAGS
    if not paths:
        raise UserError("name the pictures: orthojax predict --workdir=DIR cat.jpg")
    classifier = load_trained()
    names = [*map(printable, classifier.class_names)]
    for path, probabilities in zip(paths, classifier.predict(paths), strict=True):
        best = probabilities.argsort()[::-1][: options.top]
        named = "  ".join(f"{names[k]} {probabilities[k]:.1%}" for k in best)
        tell(f"{printable(path)}  {named}", sys.stdout)


def start():
    run(define_flags, main, arguments="IMAGE...")


if __name__ == "__main__":
    start()
