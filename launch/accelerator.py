"""Measures what there is on an accelerator, most important first, within a budget of seconds.

python launch/accelerator.py --budget=600 --output=DIR
python launch/accelerator.py --budget=600 --output=DIR --train='--config=cifar10_plain:depth=110'

Results are written as they come, to results.jsonl and report.md in the output directory. The same
command goes on with what is missing, on another machine of the same kind too if the directory is
carried there. What did not end is tried again last. First a small net is trained on the digits, as
a smoke test. With --train half of the budget goes to `launch/train.py` with these arguments, which
stops at its end with a checkpoint, and resumes from it the next time: 14 MB of plain-110 at width
16, of which `--config.keep_checkpoints=1` keeps one.
"""

import argparse
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import threading
import time

from orthojax.commands.command_line import exit_status, keep_compiled_programs
from orthojax.console import tell
from orthojax.storage.paths import local_path, output_directory, write_atomic

TRAIN = pathlib.Path(__file__).resolve().with_name("train.py")
GRACE_SECONDS = 30  # for a training to save, and to tell its end


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", type=float, default=600, help="seconds, for all of it")
    parser.add_argument("--output", type=local_path, default=pathlib.Path("runs", "accelerator"))
    parser.add_argument("--train", metavar="ARGUMENTS", help="of launch/train.py, in one word")
    parser.add_argument("--depths", type=int, nargs="+", default=(110, 44))
    parser.add_argument("--widths", type=int, nargs="+", default=(16, 64))
    parser.add_argument("--batches", type=int, nargs="+", default=(128, 1_024))
    options = parser.parse_args()
    if options.budget <= 0:
        parser.error(f"--budget={options.budget:g}: give seconds, such as 600")
    return exit_status(lambda: spend(options))


def spend(options):
    """Spends the budget; what it leaves undone is told."""
    end = time.monotonic() + options.budget
    output = output_directory(options.output)
    kept = Results(output)
    if options.train:
        train(shlex.split(options.train), output / "training", options.budget / 2)
    if "smoke" not in kept.found:
        net = f"--config=digits_plain110:depth={min(20, *options.depths)},steps=100"
        code = train([net, "--config.mesh.data=1"], output / "smoke", options.budget / 4)
        if code != 128 + signal.SIGTERM:  # else it goes on the next time
            summary = output / "smoke" / "summary.json"
            kept.add(
                "smoke", {"exit": code, **(json.loads(summary.read_bytes()) if not code else {})}
            )
    keep_compiled_programs()
    from orthojax.benchmarks.accelerator import measure, plan
    from orthojax.benchmarks.environment import environment

    kept.about = environment()
    steps = plan(tuple(options.depths), tuple(options.widths), tuple(options.batches))
    # Compiling cannot be interrupted, so that the process ends where the budget does.
    watch = threading.Timer(max(0.0, end - time.monotonic()), lambda: stop(kept, steps))
    watch.daemon = True
    watch.start()
    try:
        for step in kept.order(steps):
            kept.begin(str(step))
            try:
                found = measure(step)
            except Exception as error:  # whatever a device or a compiler raises: the others go on
                line = str(error).partition("\n")[0][:300]
                found = {"failed": f"{type(error).__name__}: {line}"}
            kept.add(str(step), found)
            tell(f"{step}: {told(found)}")
    finally:
        watch.cancel()
    stop(kept, steps)


def train(arguments, workdir, seconds):
    """Trains for so long at most; the exit status, 143 where the time was up and all is saved."""
    command = [sys.executable, str(TRAIN), f"--workdir={workdir}", *arguments]
    with workdir.with_suffix(".log").open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait(max(1.0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            return process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def stop(kept, steps):
    """Writes the report, says what is left, and ends the process."""
    kept.report()
    missing = len(kept.order(steps))
    tell(f"{len(steps) - missing} of {len(steps)} measured: {kept.directory / 'report.md'}")
    sys.stderr.flush()
    os._exit(0)


class Results:
    """What was found, in `results.jsonl`, and what was begun, in `begun.jsonl`."""

    def __init__(self, directory):
        self.directory, self.about = directory, {}
        self.found = {record["name"]: record for record in self._lines("results.jsonl")}
        self._begun = [record["name"] for record in self._lines("begun.jsonl")]

    def order(self, steps):
        """Those without a result; those that were begun already last."""
        left = [step for step in steps if str(step) not in self.found]
        return sorted(left, key=lambda step: self._begun.count(str(step)))

    def begin(self, name):
        self._append("begun.jsonl", {"name": name})

    def add(self, name, found):
        record = {"name": name, "device": self.about.get("device"), **found}
        self.found[name] = record
        self._append("results.jsonl", record)

    def report(self):
        """A table of all results, and what they depend on."""
        about = "; ".join(f"{key}: {value}" for key, value in self.about.items())
        rows = [f"| {name} | {told(record)} |" for name, record in self.found.items()]
        text = "\n".join(["# On an accelerator", "", about, "", "| | |", "|---|---|", *rows])
        write_atomic(self.directory / "report.md", f"{text}\n".encode())

    def _lines(self, name):
        path = self.directory / name
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:  # the last one, of a process that was killed
                continue
        return found

    def _append(self, name, record):
        with (self.directory / name).open("a", encoding="utf-8") as file:
            file.write(f"\n{json.dumps(record)}")  # what was cut off before stays a line of its own
            file.flush()
            os.fsync(file.fileno())


def told(found):
    """A result in words."""
    if "step_seconds" in found:
        parts = [
            f"{1e3 * found['step_seconds']:.3f} ms ({1e3 * found['lower']:.3f} to "
            f"{1e3 * found['upper']:.3f})",
            f"{found['images_per_second']:,.0f} images/s",
            f"compiled in {found['compile_seconds']:.1f} s",
        ]
        if "memory_bytes" in found:
            parts += [f"{found['memory_bytes'] / 1e6:,.0f} MB", f"{found['kernels']} kernels"]
        return ", ".join(parts)
    if "test_accuracy" in found:
        return f"test accuracy {found['test_accuracy']:.2%}, {found['seconds']:.0f} s"
    return found.get("failed") or found.get("left_out") or f"exit status {found.get('exit')}"


if __name__ == "__main__":
    sys.exit(main())
