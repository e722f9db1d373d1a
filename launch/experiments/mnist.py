"""Does what the digits show at 110 layers hold on MNIST, with three times as many test images?"""

from orthojax.experiments import modulation
from orthojax.experiments.arms import digits, folder
from orthojax.experiments.report import CELLS, cells, table, write_report
from orthojax.experiments.sweep import over_seeds

TITLE = "110 plain layers on 5,000 images of MNIST"
DEPTH = 110
SHORT = {  # arms of 300 steps at the rate that the near-isometric net has on the digits
    "near-isometric": "near_isometric",
    "SGD + L2 from He's start": "baseline",
}
SHORT_RATE = 0.01
LONG = {  # arms of the experiment `modulation`
    "the paper's start, modulated": "modulated",
    "SGD + L2 from He's start, clipped": "SGD + L2",
    "the paper's start, clipped alone": "off",
}


def config(arm):
    """The digits' config of an arm, on MNIST; what it was tuned on stays as it is."""
    if arm in SHORT:
        found = digits(DEPTH, SHORT[arm])
        found.optimizer.learning_rate = SHORT_RATE
    else:
        found = modulation.config(DEPTH, LONG[arm])
    with found.unlocked():
        found.dataset.name, found.dataset.downsample = "mnist5000", 2
    return found


def jobs(options):
    """Arm -> job."""
    return {
        arm: over_seeds(config(arm), options.workdir / folder(arm), options.seeds)
        for arm in (*SHORT, *LONG)
    }


def report(options, results):
    """Accuracy of every arm, all seeds."""
    rows = [[arm, f"{records[0]['steps']:,}", *cells(records)] for arm, records in results.items()]
    write_report(
        options,
        TITLE,
        table(["arm", "steps", *CELLS], rows),
        "Data set `mnist5000` at 14×14: 4,000 images for training, 1,000 for testing. Width 8, "
        "batches of 128, coefficients of 1e-4, nothing tuned on MNIST: rates and schedules are "
        "those of the digits. In 300 steps the rate is divided by ten at 1/2 and 3/4, and nothing "
        "is clipped; in 3,000 it falls linearly to 0, and the gradient is clipped to a norm of 1.",
    )
