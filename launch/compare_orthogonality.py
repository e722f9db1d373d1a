"""Times `orthojax.stiefel` beside PyTorch's libraries for orthonormal matrices, in one run.

python launch/compare_orthogonality.py --torch_python=PYTHON    # PYTHON: with the packages below
PYTHON -m pip install torch geotorch pogo-torch numpy

Every method minimizes the same Procrustes objective by plain gradient descent from the same start.
Workers are asked in turn, round by round. Reported are the median time of a step with its
quartiles, the error of WᵀW − I (Frobenius norm over the root of the columns), and the part of the
objective that is left after equal time, at the best of three learning rates. Without --torch_python
only this project's methods run. Writes comparison.json and comparison.md.
"""

import argparse
import functools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys

from orthojax.benchmarks.environment import environment
from orthojax.console import escape_what_cannot_be_encoded
from orthojax.errors import UserError
from orthojax.storage.paths import local_path, output_directory, write_atomic

ROOT = pathlib.Path(__file__).resolve().parent.parent
WORKERS = pathlib.Path(__file__).resolve().parent / "benchmarks"
OURS = ("polar", "qr", "pogo", "landing")
THEIRS = ("pogo-torch", "geotorch", "parametrizations.orthogonal")
SHAPES = ("64x64x64", "8x512x512", "1x2048x1024")
RATES = (0.25, 0.5, 1.0)
# A step in the parameter A of exp(A − Aᵀ) turns twice as far, and diverges sooner.
HALF = {"geotorch": 0.5, "parametrizations.orthogonal": 0.5}
SAFE_RATE = 0.1  # of the timing
SLOW, FEW = 0.5, 2  # seconds a step from which on there are so few rounds, and one descent
# Errors that count as none, and at most for a method to be compared.
EXACT, LOOSE = 1e-5, 1e-2


class Worker:
    """A process that holds one library, see `benchmarks.orthogonality`."""

    def __init__(self, python: str, script: str, cores: list[int]):
        command = [python, str(WORKERS / script), *map(str, cores)]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request) -> dict:
        """The answer to a request."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            sys.exit(f"{' '.join(self.process.args)} ended: see its error above")  # type: ignore
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def main() -> int:
    escape_what_cannot_be_encoded()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch_python", help="an interpreter with torch, geotorch, pogo-torch")
    parser.add_argument("--theirs", nargs="+", choices=THEIRS, default=THEIRS, metavar="METHOD")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="COUNTxROWSxCOLUMNS")
    parser.add_argument("--cores", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of descent")
    parser.add_argument("--descents", type=int, default=3, help="how often descent is repeated")
    parser.add_argument("--output", type=local_path, default=ROOT / "runs" / "orthogonality")
    arguments = parser.parse_args()
    shapes = [_shape(parser, text) for text in arguments.shapes]
    usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0, 1]
    if arguments.rounds < 2 or arguments.descents < 1:
        parser.error("--rounds of 2 or more show a spread, and one descent is needed")
    if max(arguments.cores) > len(usable):
        parser.error(f"--cores={max(arguments.cores)}: this process may use {len(usable)}")
    if arguments.torch_python and not shutil.which(arguments.torch_python):
        parser.error(f"--torch_python={arguments.torch_python} is no program")

    try:
        output_directory(arguments.output, "comparison.json", "comparison.md")
    except UserError as error:
        parser.error(str(error))
    rows, versions = [], {}
    for cores in arguments.cores:
        workers = {"orthojax": Worker(sys.executable, "orthogonality_jax.py", usable[:cores])}
        methods = [("orthojax", method) for method in OURS]
        if arguments.torch_python:
            script = "orthogonality_torch.py"
            workers["torch"] = Worker(arguments.torch_python, script, usable[:cores])
            methods += [("torch", method) for method in arguments.theirs]
        for worker in workers.values():
            versions |= worker.ask(versions=True)
        for shape in shapes:
            print(f"{cores} cores, {shape}", file=sys.stderr)
            rows += measure(workers, methods, shape, cores, arguments)
            _save(arguments.output, versions, rows)
        for worker in workers.values():
            worker.close()
    print(table(rows))
    return 0


def _save(output, versions, rows):
    record = {**environment(), "versions": versions, "rows": rows}
    write_atomic(output / "comparison.json", (json.dumps(record, indent=1) + "\n").encode())
    write_atomic(output / "comparison.md", (table(rows) + "\n").encode())


def measure(workers, methods, shape, cores, arguments) -> list[dict]:
    """A row for every method: seconds of a step in every round, error, gaps after equal time."""
    found = {}
    for library, method in methods:
        ask = functools.partial(workers[library].ask, method=method, shape=shape)
        first = ask(rate=SAFE_RATE, steps=1)["seconds"]  # this one allocates, and does not count
        # As many steps as take a twentieth of a second are timed together.
        steps = max(1, min(50, round(0.05 / first)))
        row = {"cores": cores, "shape": list(shape), "library": library, "method": method}
        found[method] = row | {"steps": steps, "seconds": [], "errors": [], "gaps": [], "taken": []}
    turns = [methods if number % 2 == 0 else methods[::-1] for number in range(arguments.rounds)]
    for number, turn in enumerate(turns):
        for library, method in turn:
            row = found[method]
            # Of what takes seconds a few rounds are enough.
            if number < FEW or statistics.median(row["seconds"]) < SLOW:
                ask = functools.partial(workers[library].ask, method=method, shape=shape)
                answer = ask(rate=SAFE_RATE, steps=row["steps"])
                row["seconds"].append(answer["seconds"])
                row["errors"].append(answer["error"])
    for library, method in methods:
        ask = functools.partial(workers[library].ask, method=method, shape=shape)
        rates = [rate * HALF.get(method, 1) for rate in RATES]
        found[method]["rate"] = rates[0]
        if statistics.median(found[method]["seconds"]) > SLOW:
            continue
        trials = {rate: ask(rate=rate, seconds=arguments.budget / 3) for rate in rates}
        on_manifold = [rate for rate in rates if trials[rate]["error"] < LOOSE]
        found[method]["rate"] = min(
            on_manifold, key=lambda rate, trials=trials: trials[rate]["gap"], default=rates[0]
        )
    for number, turn in enumerate(turns[: arguments.descents]):
        for library, method in turn:
            row = found[method]
            if number and statistics.median(row["seconds"]) > SLOW:
                continue
            answer = workers[library].ask(
                method=method, shape=shape, rate=row["rate"], seconds=arguments.budget
            )
            row["gaps"].append(answer["gap"])
            row["taken"].append(answer["steps"])
    return list(found.values())


def table(rows) -> str:
    """One table for each number of cores and shape, and whether the fastest method is ours."""
    lines = []
    for cores, shape in dict.fromkeys((row["cores"], tuple(row["shape"])) for row in rows):
        those = [row for row in rows if (row["cores"], tuple(row["shape"])) == (cores, shape)]
        count, height, width = shape
        lines += [
            f"{count} of {height} × {width}, {cores} core{'s' * (cores > 1)}:",
            "",
            "| | ms a step (quartiles) | error | steps | objective left |",
            "|---|---|---|---|---|",
        ]
        for row in those:
            name = f"`stiefel`, {row['method']}" if row["library"] == "orthojax" else row["method"]
            low, median, high = (1000 * x for x in statistics.quantiles(row["seconds"], n=4))
            gaps = [float("inf") if gap is None else gap for gap in row["gaps"]]
            lines.append(
                f"| {name} | {median:.3g} ({low:.3g} to {high:.3g}) | {row['errors'][-1]:.1e} |"
                f" {statistics.median(row['taken']):.0f} | {statistics.median(gaps):.1e}"
                f" ({min(gaps):.1e} to {max(gaps):.1e}) |"
            )
        lines += ["", *_verdict(those), ""]
    return "\n".join(lines).rstrip()


def _verdict(rows):
    """Their fastest method against our fastest with no larger error, round by round."""

    def fastest(library, limit):
        chosen = [row for row in rows if row["library"] == library and row["errors"][-1] <= limit]
        return min(chosen, key=lambda row: statistics.median(row["seconds"]), default=None)

    theirs = fastest("torch", LOOSE)
    ours = theirs and fastest("orthojax", max(EXACT, theirs["errors"][-1]))
    if not ours:
        return []
    ratios = [a / b for a, b in zip(ours["seconds"], theirs["seconds"], strict=False)]
    low, median, high = statistics.quantiles(ratios, n=4)
    verdict = "met" if median <= 1 else "**missed**"
    return [
        f"Time of a step, `stiefel` ({ours['method']}) / {theirs['method']}, the fastest of equal"
        f" error: {median:.2f} ({low:.2f} to {high:.2f}); target, at most 1: {verdict}."
    ]


def _shape(parser, text):
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) for part in parts):
        parser.error(f"--shapes: {text!r} is not COUNTxROWSxCOLUMNS, such as 64x64x64")
    if int(parts[1]) < int(parts[2]):
        parser.error(f"--shapes: {text!r} has more columns than rows")
    return tuple(map(int, parts))


if __name__ == "__main__":
    sys.exit(main())
