"""110 plain layers on 5,000 images of MNIST: does what the digits show hold there?

Data set `mnist5000` at 14×14: 4,000 images for training, 1,000 for testing. Width 8, batches of
128, coefficients of 1e-4, nothing tuned on MNIST: rates and schedules are those of the digits. In
300 steps the rate is divided by ten at 1/2 and 3/4, and nothing is clipped; in 3,000 it falls
linearly to 0, and the gradient is clipped to a norm of 1.
"""

from orthojax.experiments import arms
from orthojax.experiments.report import CELLS, arms_table, write_report
from orthojax.experiments.sweep import over_seeds

DEPTH = 110
MNIST = {"dataset.name": "mnist5000", "dataset.downsample": 2}
RATE_ON_DIGITS = {"optimizer.learning_rate": 0.01}  # the near-isometric net's
# Arms of 300 steps: name -> method. Arms of 3,000: name -> changes of the paper's, modulated.
SHORT = {"near-isometric": "near_isometric", "SGD + L2 from He's start": "baseline"}
LONG = {
    "the paper's start, modulated": {},
    "SGD + L2 from He's start, clipped": {**arms.HE_START, **arms.L2, **arms.UNMODULATED},
    "the paper's start, clipped alone": arms.UNMODULATED,
}


def jobs(options):
    """Arm -> job: the digits' configs on MNIST."""
    short = {arm: arms.digits(DEPTH, method, RATE_ON_DIGITS) for arm, method in SHORT.items()}
    long = {arm: arms.digits_from_papers_start(DEPTH, 3_000, made) for arm, made in LONG.items()}
    return {
        arm: over_seeds(arms.changed(config, MNIST), *options.arm(arm))
        for arm, config in (short | long).items()
    }


def report(options, results):
    """Accuracy of every arm, all seeds."""
    write_report(options, __doc__, arms_table(["arm", "steps", *CELLS], results))
