"""The race: plain and residual nets, each trained by SGD and with SOAP on its kernels.

CIFAR-10 at 16×16 (preset `full`: 32×32), batches of 128, horizontal flips only; rate down to 0
along a cosine after a warm-up of 100, gradients clipped to a norm of 1, no regularizer; BN
statistics of one pass over 1,280 training images. Runs of 2,000 steps (12,000) have width 8 (16),
and rates searched for in 2,000 (4,000). Runs of 8,000 (64,000) have width 16, and rates searched
for in 500 and then 2,000 (4,000 and then 12,000). SOAP trains the kernels, SGD with momentum the
rest: two rates. Each arm has the rates with the smallest training loss of the first seed, from a
ladder of two or three to a factor of ten, kernels first. On training images: the mean of the last
tenth of the steps.
"""

import itertools
import statistics

from orthojax.experiments import arms
from orthojax.experiments.report import arms_table, draw, lines_of, mean, write_report
from orthojax.experiments.sweep import climb, over_seeds, run_at

CARRYING = {"model.kernel_init": "carrying", "model.carry": 0.5}
# Net -> changes of `near_isometric`, and where the search begins: SGD's rate; SOAP's of the
# kernels; SGD's of the rest beside it. A net of linear branches is plain once folded.
NETS = {
    "plain, near-isometric": ({}, (0.05, 0.002, 0.05)),
    "plain, DKS": (
        {"model.norm": "none", "model.activation": "shaped_softplus"},
        (0.01, 0.002, 0.02),
    ),
    "plain, carrying, PReLU": (
        {**CARRYING, "model.bn_bias": 0.0, "model.activation": "prelu"},
        (0.05, 0.002, 0.1),
    ),
    "plain, carrying, ReLU": ({**CARRYING, "model.bn_bias": 3.0}, (0.05, 0.002, 0.1)),
    "plain, the paper's start, modulated": (
        {**arms.PAPER_START, **arms.MODULATED},
        (0.1, 0.002, 0.05),
    ),
    "plain, He": (arms.HE_START, (0.1, 0.002, 0.05)),
    "RepVGG": ({"model.kernel_init": "he", "model.parametrization": "repvgg"}, (0.1, 0.005, 0.1)),
    "residual": (arms.RESIDUAL, (0.2, 0.01, 0.1)),
    "residual, last scale 0": (arms.RESIDUAL_LAST_0, (0.2, 0.01, 0.1)),
}
OPTIMIZERS = ("SGD", "SOAP")
# Length -> (width, steps, steps of the searches for rates, each from the best of the one before).
LENGTHS = {
    "cpu": {"short": (8, 2_000, (2_000,)), "long": (16, 8_000, (500, 2_000))},
    "full": {"short": (16, 12_000, (4_000,)), "long": (16, 64_000, (4_000, 12_000))},
}
LONG = ("plain, carrying, PReLU", "plain, near-isometric", "RepVGG", "residual, last scale 0")
DEPTHS = (44, 110)
RATES, ON_TRAINING, SECONDS = "rates", "on training images (%)", "CPU s a run"


def jobs(options):
    """(layers, length, net, optimizer) -> job; of the long runs of 110 layers one seed."""
    return {
        arm: _job(options, *arm)
        for length in LENGTHS[options.preset]
        for arm in itertools.product(
            DEPTHS, [length], NETS if length == "short" else LONG, OPTIMIZERS
        )
    }


def _job(options, depth, length, net, optimizer):
    """Searches the rate of all or of the kernels, then that of the rest; then trains every seed."""
    of_sgd, of_kernels, of_rest = NETS[net][1]
    rate, rest = (of_sgd, None) if optimizer == "SGD" else (of_kernels, of_rest)
    _, steps, searches = LENGTHS[options.preset][length]

    def arm(steps, rate, rest):
        names = [length, net, optimizer, depth] + ([f"rest{rest:g}"] if rest is not None else [])
        made = config(options, depth, length, net, steps, rate, rest)
        return made, *options.arm(*names)

    def run(steps, rate, rest):
        made, directory, seeds = arm(steps, rate, rest)
        return run_at(made, directory, seeds[0])

    for search in searches:
        rate = yield from climb(lambda rate, s=search, rest=rest: run(s, rate, rest), rate)
        if rest is not None:
            rest = yield from climb(lambda rest, s=search, rate=rate: run(s, rate, rest), rest)
    made, directory, seeds = arm(steps, rate, rest)
    few = (length, depth) == ("long", 110)
    return (yield from over_seeds(made, directory, seeds[:1] if few else seeds))


def config(options, depth, length, net, steps, rate, rest=None):
    """The config of a net at a rate: of all by SGD, or of the kernels by SOAP beside `rest`."""
    sgd = {"name": "sgd", "learning_rate": rate, "momentum": 0.9}
    soap = {"name": "soap", "learning_rate": rate, "rest": {**sgd, "learning_rate": rest}}
    run = {"steps": steps, "log_every": 50, "eval_every": 500, "checkpoint_every": 250}
    run["model.width"] = LENGTHS[options.preset][length][0]
    run["optimizer"] = sgd if rest is None else soap
    fixed = {**arms.CLIPPED, **arms.COSINE, **arms.NO_REGULARIZER, **arms.UNMODULATED}
    return arms.cifar10(options, depth, "near_isometric", run, fixed, NETS[net][0])


def report(options, results):
    """Accuracy on test and training images, what a run costs, and accuracy against CPU time."""
    rows, pictures = {}, {}
    for depth, length in itertools.product(DEPTHS, LENGTHS[options.preset]):
        found = {arm: records for arm, records in results.items() if arm[:2] == (depth, length)}
        for arm in sorted(found, key=lambda arm: -mean(found[arm], "test_accuracy")):
            rows[depth, f"{found[arm][0]['steps']:,}", ", ".join(arm[2:])] = found[arm]
        if found:
            pictures[f"race_{depth}_{length}"] = _draw(f"{depth} layers, {length}", found)
    headings = ["layers", "steps", "net", RATES, "test accuracy (%)", "each", ON_TRAINING, SECONDS]
    own = {RATES: _rates, ON_TRAINING: _on_training, SECONDS: _seconds}
    table = arms_table([*headings, "n"], rows, **own)
    curves = {"test": ("test",)}
    write_report(options, __doc__, table, pictures=pictures, results=results, curves=curves)


def _rates(records):
    names = ("learning_rate", "rest_rate")
    return " / ".join(f"{records[0][name]:g}" for name in names if name in records[0])


def _on_training(records):
    return f"{100 * mean(records, 'train_accuracy'):.1f}"


def _median_seconds(records):
    seconds = [record["cpu_seconds"] for record in records if record["cpu_seconds"]]
    return statistics.median(seconds) if seconds else None


def _seconds(records):
    seconds = _median_seconds(records)
    return "" if seconds is None else f"{seconds:,.0f}"


def _draw(title, found):
    """Accuracy against steps, and against the CPU time that they take."""
    by_step, by_time = [], []
    for (_, _, net, optimizer), records in found.items():
        color, dashes = f"C{list(NETS).index(net)}", {"SGD": "--", "SOAP": "-"}[optimizer]
        arm, seconds = {f"{net}, {optimizer}": records}, _median_seconds(records)
        lines = lines_of(arm, "test", color=color, linestyle=dashes)
        by_step += lines
        if seconds:
            step = seconds / records[0]["steps"]
            by_time += [line._replace(x=[step * at for at in line.x]) for line in lines]
    named = {"xlabel": "step", "ylabel": "test accuracy (%)", "title": title}
    return draw((by_step, named), (by_time, {"xlabel": "CPU seconds"}), sharey=True)
