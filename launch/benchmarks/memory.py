"""Memory of the compiled training step, as XLA allocates it: nothing is run."""

from orthojax.benchmarks.measurements import measurement
from orthojax.benchmarks.programs import BASELINE, METHOD, lower_on_digits, peak_memory, programs
from orthojax.models.stacking import REMATS


def measure(rounds: int, depth: int):
    """Measures memory; the number of rounds is of no concern to them."""
    del rounds
    held = {
        BASELINE: peak_memory(programs(BASELINE, depth).compiled_train_step),
        METHOD: peak_memory(programs(METHOD, depth).compiled_train_step),
        "unrolled": peak_memory(programs(BASELINE, depth, scan=False).compiled_train_step),
        "remat": peak_memory(programs(METHOD, depth, remat="blocks").compiled_train_step),
        "110": peak_memory(programs(METHOD, 110).compiled_train_step),
        "110, remat": peak_memory(programs(METHOD, 110, remat="blocks").compiled_train_step),
    }
    deep = {remat: peak_memory(lower_on_digits(1004, remat).compile()) for remat in REMATS}

    def ratio(name, above, below, **target):
        return measurement(name, [held[above] / held[below]], **target)

    return [
        measurement(f"memory of plain-{depth}, {BASELINE}", [held[BASELINE] / 2**20], unit="MiB"),
        ratio("memory, ortho + modulation / L2", METHOD, BASELINE, at_most=1.01),
        ratio("memory, scanned / unrolled", BASELINE, "unrolled"),
        ratio("memory, with remat / without", "remat", METHOD),
        ratio(f"memory, plain-110 / plain-{depth}", "110", METHOD),
        ratio(f"memory, plain-110 / plain-{depth}, both with remat", "110, remat", "remat"),
        measurement("memory of 1,004 layers, digits", [deep["none"] / 2**20], unit="MiB"),
        measurement(
            "memory of 1,004 layers, with remat / without", [deep["blocks"] / deep["none"]]
        ),
        measurement(
            "memory of 1,004 layers, segments / without", [deep["segments"] / deep["none"]]
        ),
    ]
