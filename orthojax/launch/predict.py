"""Says what a trained net sees in pictures.

python -m orthojax.launch.predict --workdir=runs/cifar10_plain cat.jpg dog.png
"""

import sys

from absl import flags

from orthojax.console import printable, tell
from orthojax.launch.command_line import define_trained, load_trained, run


def define_flags():
    define_trained()
    flags.DEFINE_integer("top", 3, "How many classes to name for each picture.", lower_bound=1)


def main(paths):
    from orthojax.errors import UserError

    options = flags.FLAGS
    if not paths:
        raise UserError("name the pictures: python launch/predict.py --workdir=DIR cat.jpg")
    classifier = load_trained()
    names = [*map(printable, classifier.class_names)]
    for path, probabilities in zip(paths, classifier.predict(paths), strict=True):
        best = probabilities.argsort()[::-1][: options.top]
        named = "  ".join(f"{names[k]} {probabilities[k]:.1%}" for k in best)
        tell(f"{printable(path)}  {named}", sys.stdout)


if __name__ == "__main__":
    run(define_flags, main, arguments="IMAGE...")
