"""Says what a trained net sees in pictures.

python -m orthojax.launch.predict --workdir=runs/cifar10_plain cat.jpg dog.png
"""

import sys

from absl import flags

from orthojax.console import tell
from orthojax.launch.command_line import run


def define_flags():
    flags.DEFINE_string("workdir", None, "Of the run.", required=True)
    flags.DEFINE_string("step", "best", "Which checkpoint: best, latest, or its step.")
    flags.DEFINE_integer("top", 3, "How many classes to name for each picture.", lower_bound=1)


def main(paths):
    from orthojax.errors import UserError
    from orthojax.inference import load

    options = flags.FLAGS
    if not paths:
        raise UserError("name the pictures: python launch/predict.py --workdir=DIR cat.jpg")
    classifier = load(options.workdir, options.step)
    for path, probabilities in zip(paths, classifier.predict(paths), strict=True):
        best = probabilities.argsort()[::-1][: options.top]
        named = "  ".join(f"{classifier.class_names[k]} {probabilities[k]:.1%}" for k in best)
        tell(f"{path}  {named}", sys.stdout)


if __name__ == "__main__":
    run(define_flags, main, arguments="IMAGE...")
