"""Figures of a benchmark, and the command that measures them, on a tiny net."""

import json
import pathlib
import subprocess
import sys

import pytest

from orthojax.benchmarks import input
from orthojax.benchmarks.measurements import measurement, read, regressions, save, table
from orthojax.errors import UserError

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"


def test_quartiles_targets_and_verdicts():
    ceiling = measurement("step", [4.0, 1.0, 2.0, 3.0, 5.0], at_most=3.0)
    assert (ceiling.lower, ceiling.median, ceiling.upper, ceiling.rounds) == (2.0, 3.0, 4.0, 5)
    floor = measurement("rate", [0.6], at_least=0.7)
    assert (ceiling.met, floor.met, measurement("x", [1.0]).met) == (True, False, None)
    assert "| step | 3.000 | 2.000 to 4.000 | at most 3 | met |" in table([ceiling, floor])
    assert "| rate | 0.600 | - | at least 0.7 | **missed** |" in table([ceiling, floor])


@pytest.mark.parametrize("target", ["at_most", "at_least"])
def test_only_ratios_and_only_clear_differences_are_regressions(target):
    def found(name, middle, **options):
        spread = [middle * factor for factor in (0.98, 0.99, 1.0, 1.01, 1.02)]
        return measurement(name, spread, **{target: 1.0}, **options)

    baseline = {name: found(name, 1.0) for name in ("ratio", "noisy", "other")}
    baseline["s"] = found("s", 1.0, unit="s")
    worse = 1.2 if target == "at_most" else 0.8
    slightly = 1.04 if target == "at_most" else 0.96
    now = [found("ratio", worse), found("noisy", slightly), found("new", worse)]
    now += [found("other", 1 / worse), found("s", worse, unit="s")]
    assert [line.partition(":")[0] for line in regressions(now, baseline)] == ["ratio"]


def test_what_is_saved_is_read_again(tmp_path):
    found = [measurement("a", [1.0, 2.0, 3.0], at_most=2.0), measurement("b", [4.0], unit="s")]
    save(tmp_path / "measurements.json", found, command="x")
    assert list(read(tmp_path / "measurements.json").values()) == found
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="other.json holds no measurements"):
        read(tmp_path / "other.json")


def test_the_command_measures_writes_and_compares_with_the_baseline(tmp_path, program, monkeypatch):
    monkeypatch.setattr(input, "STEPS", 1)
    small = ("input", "--depth=8", "--rounds=2", f"--output={tmp_path / 'out'}")
    lacking = f"--data_dir={tmp_path}"
    done = program("benchmark", *small, lacking, f"--baseline={tmp_path / 'none.json'}")
    assert done.code == 0, done.err
    assert "imagenet2012' is not prepared" in done.err
    written = json.loads((tmp_path / "out/measurements.json").read_text())
    names = [found["name"] for found in written["measurements"]]
    assert len(names) == 2 and all(name in done.out for name in names)
    assert written["cores"] >= 1 and written["jax"]
    assert (tmp_path / "out/measurements.png").read_bytes().startswith(b"\x89PNG")


def test_impossible_arguments_are_refused_at_once(tmp_path, program):
    assert "--rounds=1 shows no spread" in program("benchmark", "step", "--rounds=1").err
    assert "invalid choice: 'speed'" in program("benchmark", "speed").err
    (tmp_path / "broken.json").write_text("{}")
    done = program("benchmark", "memory", f"--baseline={tmp_path / 'broken.json'}")
    assert done.code == 2 and "holds no measurements" in done.err


@pytest.mark.slow
def test_everything_on_a_small_net(tmp_path):
    command = [sys.executable, str(LAUNCH / "benchmark.py"), "all", "--depth=8", "--rounds=2"]
    done = subprocess.run([*command, f"--output={tmp_path}"], capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    names = " ".join(read(tmp_path / "measurements.json"))
    for part in ("step time", "convolution, ours", "compile time", "memory", "CIFAR-10"):
        assert part in names


def test_profiling_names_the_instructions_of_a_step():
    tiny = ("--config=digits_plain110:depth=8,steps=6", "--config.model.width=2")
    small = ("--config.batch_size=8", "--config.mesh.data=1")
    # In a process of its own: JAX's profiler ends one that has other programs.
    command = [sys.executable, str(LAUNCH / "profile_step.py"), *tiny, *small, "--top=5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    head, *lines = done.stdout.splitlines()
    assert head.split() == ["ms/step", "times", "instruction,", "result,", "origin"]
    times = [float(line.split()[0]) for line in lines]
    assert len(times) == 5 and times == sorted(times, reverse=True) and times[0] > 0
