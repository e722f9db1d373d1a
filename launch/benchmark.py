"""Measures step, SOAP, convolutions, latency, input, compilation and memory, against a baseline.

python launch/benchmark.py all                    # ten minutes on two CPU cores
python launch/benchmark.py step memory --rounds=5
python launch/benchmark.py input --data_dir=DIR   # DIR with a prepared imagenet2012

What is compared takes turns within a round, and ratios are taken round by round. Writes
measurements.json, measurements.md and measurements.png; the exit status is 1 if a ratio is worse
than the baseline's. No data set is needed, except for the input of photographs; PyTorch is compared
with where it is installed.
"""

import argparse
import importlib
import os
import pathlib
import sys
import time

from orthojax.benchmarks.environment import environment
from orthojax.commands.allocator import add_keep_memory, keep_freed_memory
from orthojax.console import escape_what_cannot_be_encoded
from orthojax.storage.paths import local_path

ROOT = pathlib.Path(__file__).resolve().parent.parent
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)  # compilation is measured, too

PARTS = ("step", "soap", "convolution", "latency", "input", "compile", "memory")
KINDS = ("json", "md", "png")  # of what is written
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}


def main() -> int:
    escape_what_cannot_be_encoded()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=(*PARTS, "all"), metavar="|".join(PARTS))
    parser.add_argument("--rounds", type=int, default=11, help="at least 2")
    parser.add_argument("--depth", type=int, default=44, help="of the net")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="cpu",
        help="of steps and latency: CPU time of the process, or on an idle machine wall time",
    )
    parser.add_argument(
        "--torch_compile",
        action="store_true",
        help="compare the step with torch.compile's too, which takes minutes to compile",
    )
    parser.add_argument("--data_dir", help="of the prepared imagenet2012")
    parser.add_argument("--output", type=local_path, default=ROOT / "runs" / "benchmark")
    parser.add_argument(
        "--baseline", type=local_path, default=ROOT / "docs" / "runs" / "benchmark" / "2.json"
    )
    add_keep_memory(parser)
    arguments = parser.parse_args()
    if arguments.keep_memory:
        keep_freed_memory()
    if arguments.rounds < 2:
        parser.error(f"--rounds={arguments.rounds} shows no spread; give 2 or more")

    from orthojax.benchmarks.measurements import draw, read, regressions, save, table
    from orthojax.errors import UserError
    from orthojax.storage.paths import output_directory, write_atomic

    try:
        output_directory(arguments.output, *(f"measurements.{kind}" for kind in KINDS))
        baseline = read(arguments.baseline) if arguments.baseline.exists() else {}
    except UserError as error:
        parser.error(str(error))
    clock = {"clock": CLOCKS[arguments.clock]}
    extras = {
        "convolution": clock,
        "step": {**clock, "torch_compile": arguments.torch_compile},
        "latency": clock,
        "soap": clock,
        "input": {"data_dir": arguments.data_dir},
    }
    found = []
    for part in PARTS:
        if part in arguments.parts or "all" in arguments.parts:
            print(f"{part}:", file=sys.stderr)
            measure = importlib.import_module(f"orthojax.benchmarks.{part}").measure
            found += measure(arguments.rounds, arguments.depth, **extras.get(part, {}))
    print(table(found))
    save(arguments.output / "measurements.json", found, **environment())
    write_atomic(arguments.output / "measurements.md", (table(found) + "\n").encode())
    draw(found, arguments.output / "measurements.png")
    worse = regressions(found, baseline)
    print(*(f"worse than {arguments.baseline}: {line}" for line in worse), sep="\n", end="")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
