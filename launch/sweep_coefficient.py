"""Sweeps the coefficient of the orthonormality penalty on the digits: records and a picture.

python launch/sweep_coefficient.py    # writes runs/coefficient/coefficient.jsonl and .png

Runs in the records already are not run again; an interrupted one goes on where it was. The records
of docs/coefficient.md are docs/coefficient.jsonl.
"""

import argparse
import json
import math
import pathlib
import statistics
import sys

from orthojax import orthonormality_error
from orthojax.commands.command_line import exit_status
from orthojax.configs.digits_plain110 import get_config
from orthojax.console import tell
from orthojax.errors import DivergenceError
from orthojax.inference import load_classifier
from orthojax.models import unstack_blocks
from orthojax.pictures.picture import check_picture, new_picture, write_picture
from orthojax.storage.paths import check_output, local_path, output_directory
from orthojax.training.train import train_and_evaluate

ROOT = pathlib.Path(__file__).resolve().parent.parent
COEFFICIENTS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
ERROR = "orthonormality_error"
PANELS = (("test_accuracy", 100, "test accuracy (%)"), (ERROR, 1, "mean orthonormality error"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default=ROOT / "runs" / "coefficient", type=local_path)
    parser.add_argument(
        "--output", help="of the records (WORKDIR/coefficient.jsonl)", type=local_path
    )
    arguments = parser.parse_args()
    output = arguments.output or arguments.workdir / "coefficient.jsonl"
    return exit_status(lambda: sweep(output, arguments.workdir))


def sweep(output: pathlib.Path, directory: pathlib.Path) -> None:
    """Trains what has no record yet, and draws all records."""
    if output.parent != directory:
        check_output(output)
    output_directory(directory)
    check_picture(output.with_suffix(".png"))
    lines = output.read_bytes().splitlines() if output.exists() else []
    records = [json.loads(line) for line in lines]
    finished = {(record["coefficient"], record["seed"]) for record in records}
    wanted = [(coefficient, seed) for seed in range(3) for coefficient in COEFFICIENTS]
    left = [arm for arm in wanted if arm not in finished]
    tell(f"{len(wanted) - len(left)} runs of {len(wanted)} are in {output}, {len(left)} are left")
    for coefficient, seed in left:
        workdir = directory / f"coefficient={coefficient:g}-seed={seed}"
        records.append(train(coefficient, seed, workdir))
        with output.open("a", encoding="utf-8") as file:
            file.write(json.dumps(records[-1]) + "\n")
        tell(str(records[-1]))
    draw(records, output.with_suffix(".png"))
    tell(f"written to {output.parent}: {output.name}, {output.stem}.png", sys.stdout)


def train(coefficient: float, seed: int, workdir: pathlib.Path) -> dict:
    """One run; `test_accuracy` and `orthonormality_error` are None where it diverged."""
    config = get_config("depth=20,steps=100")
    config.seed, config.model.bn_bias, config.regularizer.coefficient = seed, 1.0, coefficient
    try:
        accuracy = train_and_evaluate(config, workdir)["test_accuracy"]
        error = statistics.fmean(final_errors(workdir))
    except DivergenceError:
        accuracy = error = None
    return {"coefficient": coefficient, "seed": seed, "test_accuracy": accuracy, ERROR: error}


def final_errors(workdir: pathlib.Path) -> list[float]:
    """`orthonormality_error` of every layer's kernel in the last checkpoint."""
    params = load_classifier(workdir).variables["params"]
    return [float(error) for error in orthonormality_error(unstack_blocks(params)).values()]


def draw(records: list[dict], path: pathlib.Path) -> None:
    """Every run a dot, the means a line; the coefficient 0 stands left of the smallest other."""
    picture = new_picture(9, 3.4)
    values = sorted({record["coefficient"] for record in records})
    places = {value: value or min(filter(None, values)) / 10 for value in values}
    labels = [f"$10^{{{round(math.log10(v))}}}$" if v else "0" for v in values]
    for axes, (key, scale, label) in zip(picture.subplots(1, 2), PANELS, strict=True):
        runs = [(r["coefficient"], scale * r[key]) for r in records if r[key] is not None]
        means = {v: [y for x, y in runs if x == v] for v in values}
        line = [(places[v], statistics.fmean(ys)) for v, ys in means.items() if ys]
        axes.scatter([places[x] for x, _ in runs], [y for _, y in runs], s=14, color="#0072B2")
        axes.plot(*zip(*line, strict=True), color="#0072B2", linewidth=1.2)
        axes.set(xscale="log", xlabel="coefficient λ", ylabel=label)
        axes.set_xticks(list(places.values()), labels)
    if runs:  # not all have diverged
        axes.set_yscale("log")
    write_picture(picture, path)


if __name__ == "__main__":
    sys.exit(main())
