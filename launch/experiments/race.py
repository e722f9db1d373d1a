"""Plain nets against residual ones, each trained by SGD and with SOAP on its kernels."""

import statistics

from orthojax.experiments.arms import LADDER, MODULATED, cifar10, clip, folder
from orthojax.experiments.report import accuracy, table, write_report
from orthojax.experiments.sweep import climb, over_seeds, run_at, run_name
from orthojax.pictures.picture import clear_frame, new_picture
from orthojax.storage.metrics import read_metrics

TITLE = "The race: plain and residual nets, SGD and SOAP"
NORMALIZED = {"kernel_init": "he", "bn_bias": 0.0}
CARRYING = {"kernel_init": "carrying", "carry": 0.5}
# Net -> changes of the model of `near_isometric`. A net of linear branches is plain once folded.
NETS = {
    "plain, near-isometric": {},
    "plain, DKS": {"norm": "none", "activation": "shaped_softplus"},
    "plain, carrying, PReLU": {**CARRYING, "bn_bias": 0.0, "activation": "prelu"},
    "plain, carrying, ReLU": {**CARRYING, "bn_bias": 3.0},
    "plain, the paper's start, modulated": {"kernel_init": "orthonormal", "bn_bias": 0.0},
    "plain, He": NORMALIZED,
    "RepVGG": {"kernel_init": "he", "parametrization": "repvgg"},
    "residual": {"name": "ResNet", **NORMALIZED},
    "residual, last scale 0": {"name": "ResNet", "zero_init_residual": True, **NORMALIZED},
}
# Net -> where the search begins: SGD's rate; SOAP's of the kernels; SGD's of the rest beside it.
STARTS = {
    "plain, near-isometric": (0.05, 0.002, 0.05),
    "plain, DKS": (0.01, 0.002, 0.02),
    "plain, carrying, PReLU": (0.05, 0.002, 0.1),
    "plain, carrying, ReLU": (0.05, 0.002, 0.1),
    "plain, the paper's start, modulated": (0.1, 0.002, 0.05),
    "plain, He": (0.1, 0.002, 0.05),
    "RepVGG": (0.1, 0.005, 0.1),
    "residual": (0.2, 0.01, 0.1),
    "residual, last scale 0": (0.2, 0.01, 0.1),
}
OPTIMIZERS = ("SGD", "SOAP")
# Length -> (width, steps, steps of the searches for rates, each from the best of the one before).
LENGTHS = {
    "cpu": {"short": (8, 2_000, (2_000,)), "long": (16, 8_000, (500, 2_000))},
    "full": {"short": (16, 12_000, (4_000,)), "long": (16, 64_000, (4_000, 12_000))},
}
LONG = ("plain, carrying, PReLU", "plain, near-isometric", "RepVGG", "residual, last scale 0")
DEPTHS = (44, 110)


def jobs(options):
    """`layers, length, net, optimizer` -> job; of the long runs of 110 layers one seed."""
    return {
        f"{depth}, {length}, {net}, {optimizer}": _job(options, depth, length, net, optimizer)
        for length in LENGTHS[options.preset]
        for depth in DEPTHS
        for net in (NETS if length == "short" else LONG)
        for optimizer in OPTIMIZERS
    }


def _job(options, depth, length, net, optimizer):
    """Searches the rate of all or of the kernels, then that of the rest; then trains every seed."""
    all_or_kernels, rates = (0, 1)[optimizer == "SOAP"], STARTS[net]
    rate, rest = rates[all_or_kernels], rates[2] if optimizer == "SOAP" else None
    _, steps, searches = LENGTHS[options.preset][length]

    def run(steps, rate, rest):
        made = config(options, depth, length, net, rate, rest)
        made.steps = steps
        return run_at(made, directory(options, depth, length, net, optimizer, rest), seed=0)

    for search in searches:
        rate = yield from climb(lambda r, s=search, rest=rest: run(s, r, rest), LADDER, rate)
        if rest is not None:
            rest = yield from climb(lambda r, s=search, rate=rate: run(s, rate, r), LADDER, rest)
    seeds = options.seeds if (length, depth) != ("long", 110) else options.seeds[:1]
    made = config(options, depth, length, net, rate, rest)
    made.steps = steps
    place = directory(options, depth, length, net, optimizer, rest)
    return (yield from over_seeds(made, place, seeds))


def directory(options, depth, length, net, optimizer, rest):
    """Of the runs of an arm at one rate of the rest."""
    names = [length, net, optimizer, depth] + ([f"rest{rest:g}"] if rest is not None else [])
    return options.workdir / folder(*names)


def config(options, depth, length, net, rate, rest=None):
    """The config of a net at a rate: of all by SGD, or of the kernels by SOAP beside `rest`."""
    made = cifar10(depth, "near_isometric", options.preset, options.data_dir)
    clip(made)
    made.model.width, made.steps, _ = LENGTHS[options.preset][length]
    made.schedule = {"name": "cosine", "warmup_steps": 100}
    made.log_every, made.eval_every, made.checkpoint_every = 50, 500, 250
    with made.unlocked(), made.ignore_type():
        made.regularizer = {"name": "none"}
        made.model.update(NETS[net])
        made.modulation = MODULATED if "modulated" in net else None
        if made.model.get("norm") == "none":
            del made.model["bn_bias"]
            made.recalibrate_bn = 0
        sgd = {"name": "sgd", "learning_rate": rate, "momentum": 0.9}
        made.optimizer = sgd
        if rest is not None:
            sgd["learning_rate"] = rest
            made.optimizer = {"name": "soap", "learning_rate": rate, "rest": sgd}
    return made


def report(options, results):
    """Accuracy on test and training images, what a run costs, and accuracy against CPU time."""
    rows, pictures, drawn = [], {}, []
    for depth in DEPTHS:
        for length in LENGTHS[options.preset]:
            found = {
                name.split(", ", 2)[2]: records
                for name, records in results.items()
                if name.startswith(f"{depth}, {length}, ")
            }
            ordered = sorted(found.items(), key=lambda item: -_mean(item[1], "test_accuracy"))
            rows += [_row(depth, arm, records) for arm, records in ordered]
            if found:
                curves = _curves(options, depth, length, found)
                drawn += [curve for arm in curves.values() for curve in arm]
                pictures[f"race_{depth}_{length}"] = _draw(depth, length, found, curves)
    headings = ["layers", "steps", "net", "rates", "test accuracy (%)", "each"]
    headings += ["on training images (%)", "CPU s a run", "n"]
    write_report(
        options,
        TITLE,
        table(headings, rows),
        f"CIFAR-10 at {'16×16' if options.preset == 'cpu' else '32×32'}, batches of 128, "
        "horizontal flips only; rate down to 0 along a cosine after a warm-up of 100, gradients "
        "clipped to a norm of 1, no regularizer; BN statistics of one pass over 1,280 training "
        f"images. {_of_lengths(options)} SOAP trains the kernels, SGD with momentum the rest: two "
        "rates. Each arm has the rates with the smallest training loss of the first seed, from a "
        "ladder of two or three to a factor of ten, kernels first. On training images: the mean of "
        "the last tenth of the steps.",
        pictures=pictures,
        curves=drawn,
    )


def _of_lengths(options):
    return " ".join(
        f"Runs of {steps:,} steps have width {width}, and rates searched for in "
        f"{' and then '.join(f'{search:,}' for search in searches)}."
        for width, steps, searches in LENGTHS[options.preset].values()
    )


def _mean(records, key):
    return statistics.fmean(record[key] for record in records)


def _row(depth, arm, records):
    net, optimizer = arm.rsplit(", ", 1)
    seconds = [r["cpu_seconds"] for r in records if r["cpu_seconds"]]
    rates = [f"{records[0]['learning_rate']:g}"]
    if "rest_rate" in records[0]:
        rates.append(f"{records[0]['rest_rate']:g}")
    return [
        depth,
        f"{records[0]['steps']:,}",
        f"{net}, {optimizer}",
        " / ".join(rates),
        accuracy(records),
        ", ".join(f"{100 * r['test_accuracy']:.1f}" for r in records),
        f"{100 * _mean(records, 'train_accuracy'):.1f}",
        f"{statistics.median(seconds):,.0f}" if seconds else "",
        len(records),
    ]


def _curves(options, depth, length, found):
    """Arm -> `(run, name, steps, % of test images)` of every seed."""
    curves = {}
    for arm, records in found.items():
        net, optimizer = arm.rsplit(", ", 1)
        curves[arm] = []
        for record in records:
            place = directory(options, depth, length, net, optimizer, record.get("rest_rate"))
            run = place / run_name(record["learning_rate"], record["steps"], record["seed"])
            points = [
                (m["step"], 100 * m["accuracy"]) for m in read_metrics(run) if m["kind"] == "test"
            ]
            curves[arm].append((run, "test", *map(list, zip(*points, strict=True))))
    return curves


def _draw(depth, length, found, curves):
    """Accuracy against steps, and against the CPU time that they take."""
    picture = new_picture(9.0, 4.2)
    by_step, by_time = picture.subplots(1, 2, sharey=True)
    for arm, records in found.items():
        seconds = [r["cpu_seconds"] for r in records if r["cpu_seconds"]]
        a_step = statistics.median(seconds) / records[0]["steps"] if seconds else None
        style = {
            "color": f"C{list(NETS).index(arm.rsplit(', ', 1)[0])}",
            "linestyle": "-" if arm.endswith("SOAP") else "--",
            "linewidth": 1.2,
        }
        for seed, (_, _, steps, values) in enumerate(curves[arm]):
            by_step.plot(steps, values, label=None if seed else arm, **style)
            if a_step:
                by_time.plot([a_step * step for step in steps], values, **style)
    by_step.set(xlabel="step", ylabel="test accuracy (%)", title=f"{depth} layers, {length}")
    by_time.set(xlabel="CPU seconds")
    for axes in (by_step, by_time):
        clear_frame(axes)
    by_step.legend(frameon=False, fontsize=6)
    return picture
