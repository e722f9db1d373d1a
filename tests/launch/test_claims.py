"""What the README claims of the two digits configs, run as a user runs them."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run(config, workdir, seed):
    subprocess.run(
        [
            *(sys.executable, str(ROOT / "launch" / "train.py")),
            f"--config={ROOT / 'configs' / config}",
            f"--workdir={workdir}",
            f"--config.seed={seed}",
            "--config.mesh.data=1",
        ],
        check=True,
    )
    return json.loads((workdir / "summary.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_110_plain_layers_learn_the_digits(seed, tmp_path):
    summary = run("digits_plain110.py", tmp_path / "run", seed)
    assert summary["test_accuracy"] >= 0.97


@pytest.mark.slow
def test_sgd_with_l2_stays_at_chance(tmp_path):
    summary = run("digits_plain110.py:method=baseline", tmp_path / "run", seed=0)
    assert summary["test_accuracy"] < 0.2
