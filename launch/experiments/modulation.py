"""Modulation from the paper's start, on the digits: Gram-Schmidt kernels, BN bias 0.

Width 8, batches of 128, SGD with momentum 0.9, the gradient clipped to a norm of 1, the rate
falling linearly to 0. Up to 62 layers each arm has the rate with the smallest training loss of the
first seed, from a ladder; from 110 layers on all have the same, and LARS the one it has at 62.
Coefficients are 1e-4, or, of strong regularizers, such that λ Σ η is the paper's.
"""

from orthojax.experiments import arms
from orthojax.experiments.report import CELLS, against_depth, arms_table, draw, write_report
from orthojax.experiments.sweep import over_seeds, tuned

STEPS = {20: 600, 44: 600, 62: 600, 110: 3_000, 302: 3_000}
SEARCHED = (20, 44, 62)  # depths at which every arm finds its own rate
DROP = {"schedule": {"name": "step_decay", "warmup_steps": 20, "boundaries": (0.5,), "factor": 0.1}}
STRONG = ", strong regularizer"  # λ Σ η is the paper's
# Arm -> changes of the paper's start, modulated.
ARMS = {
    "modulated": {},
    "off": arms.UNMODULATED,
    "SGD + L2": {"model.kernel_init": "he", **arms.UNMODULATED, **arms.L2},
    "tolerance 1": {"modulation.tolerance": 1.0},
    "tolerance 10,000": {"modulation.tolerance": 1e4},
    "the first 60 steps": {"modulation.steps": 60},
    "the first 300 steps": {"modulation.steps": 300},
    "the first 300 steps, then a tenth of the rate": {"modulation.steps": 300, **DROP},
    "throughout, from step 300 at a tenth of the rate": DROP,
    "normalized error": {"modulation.tolerance": 1.0, "modulation.reference": 1.0},
    "LARS": {**arms.UNMODULATED, **arms.LARS},
}
MAIN, RIVALS = ("modulated", "off", "SGD + L2"), ("normalized error", "LARS")
# From the near-isometric start, whose error does not explode: at its best rate, and at four times.
ISOMETRIC_STEPS = 300
ISOMETRIC = {
    f"near-isometric{times}, {modulated}": {"optimizer.learning_rate": rate, **changes}
    for times, rate in (("", 0.01), (" at 4 times the rate", 0.04))
    for modulated, changes in (("modulated", {}), ("off", arms.UNMODULATED))
}
# Most important first, so an interrupted run is still useful.
ORDER = (
    (110, "modulated"),
    *((depth, arm) for depth in SEARCHED[::-1] for arm in MAIN),
    *((110, arm) for arm in ("off", "SGD + L2", *ISOMETRIC)),
    *((62, arm) for arm in ARMS if arm not in MAIN + RIVALS),
    *((depth, arm) for depth in (62, 44, 110) for arm in RIVALS),
    *((110, arm + STRONG) for arm in MAIN),
    (302, "modulated"),
)


def config(depth, arm):
    """The config of an arm; from the paper's start all have a rate that falls linearly to 0."""
    if arm in ISOMETRIC:
        return arms.digits(depth, "near_isometric", ISOMETRIC[arm], steps=ISOMETRIC_STEPS)
    changes = ARMS[arm.removesuffix(STRONG)]
    found = arms.digits_from_papers_start(depth, STEPS[depth], changes)
    if arm.endswith(STRONG):
        found.regularizer.coefficient = arms.coefficient(found)
    return found


def jobs(options):
    """(depth, arm) -> job. At 110 layers and more, where runs are long, one rate serves all."""
    found = {}
    for depth, arm in ORDER:
        made = config(depth, arm), *options.arm(arm, depth)
        found[depth, arm] = tuned(*made, start=0.05) if depth in SEARCHED else over_seeds(*made)
    return found


def report(options, results):
    """Accuracy of every arm at every depth, all seeds."""
    ordered = {
        (depth, f"{ISOMETRIC_STEPS if arm in ISOMETRIC else STEPS[depth]:,}", arm): records
        for (depth, arm), records in sorted(results.items(), key=lambda item: item[0][0])
    }
    drawn = {arm: records for arm, records in results.items() if arm[1] in MAIN}
    table = arms_table(["layers", "steps", "arm", *CELLS], ordered)
    write_report(options, __doc__, table, pictures={"modulation": draw(against_depth(drawn))})
