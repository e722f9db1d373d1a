"""The commands of the page on trained nets, one after the other, each in a process of its own."""

import json
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

ROOT = pathlib.Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "inference.md"
TINY = "--config.model.width=4 --config.steps=12 --config.model.depth=8 --config.mesh.data=1"


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each command of the page said, by the name of its program."""
    place = tmp_path_factory.mktemp("user")
    rng = np.random.default_rng(0)
    for name in ("one", "two", "three"):
        pixels = rng.integers(0, 256, (20, 30), np.uint8)
        PIL.Image.fromarray(pixels).save(place / f"{name}.png")
    commands = re.search(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)[1].splitlines()
    found = {}
    for command in commands:
        python, program, *words = shlex.split(command)
        assert python == "python"
        tiny = TINY.split() if "train" in program else []
        found[pathlib.Path(program).stem] = subprocess.run(
            [sys.executable, ROOT / program, *words, *tiny],
            cwd=place,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return place, found


def test_predict_names_a_class_for_every_picture(told):
    lines = told[1]["predict"].splitlines()
    assert [line.split()[0] for line in lines] == ["one.png", "two.png", "three.png"]
    for line in lines:
        shares = [float(share) for share in re.findall(r"([\d.]+)%", line)]
        assert len(shares) == 3 and shares == sorted(shares, reverse=True)


def test_evaluate_agrees_with_training(told):
    place, said = told
    found = json.loads((place / "runs/digits/evaluation.json").read_text())
    summary = json.loads((place / "runs/digits/summary.json").read_text())
    assert found["accuracy"] == summary["best_test_accuracy"]
    assert found["images"] == 360 == sum(map(sum, found["confusion"]))
    assert f"top-1 {found['accuracy']:.2%}" in said["evaluate"]
    assert (place / "runs/digits/confusion.png").stat().st_size > 10_000


def test_export_leaves_a_program(told):
    place, said = told
    assert "uint8 (N, 8, 8, 1) to float32 (N, 10)" in said["export"]
    assert (place / "digits.stablehlo").stat().st_size > 1000
