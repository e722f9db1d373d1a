"""`launch/accelerator.py`: what comes first, what is kept; programs of several nets and steps."""

import json
import types

import accelerator
import jax
import numpy as np
import pytest

from orthojax.benchmarks import accelerator as measurements
from orthojax.benchmarks.accelerator import Step, _several, measure, plan
from orthojax.benchmarks.programs import METHOD, constant_batch, experiment
from orthojax.training.compiled import compile_steps


@pytest.fixture
def spend(tmp_path, monkeypatch):
    """Runs the command in `tmp_path`, each figure by a function; what was measured, in order."""

    class Ended(Exception):
        pass

    def end(code):
        raise Ended

    def run(measured):
        order = []

        def record(step):
            order.append(str(step))
            return measured(step)

        monkeypatch.setattr(measurements, "measure", record)
        options = types.SimpleNamespace(budget=60.0, output=tmp_path, train=None)
        options.depths, options.widths, options.batches = (8,), (2,), (8,)
        with pytest.raises((Ended, KeyboardInterrupt)):
            accelerator.spend(options)
        return order

    monkeypatch.setattr(accelerator, "train", lambda *_: 2)
    monkeypatch.setattr(accelerator, "keep_compiled_programs", lambda: None)
    monkeypatch.setattr("os._exit", end)
    return run


def found(step):
    return {"left_out": "nothing was measured"}


def test_an_interrupted_run_goes_on_with_what_is_missing(spend, tmp_path):
    steps = [str(step) for step in plan((8,), (2,), (8,))]
    assert len(steps) == len(set(steps)) > 15

    def interrupted(step):
        if str(step) == steps[2]:
            raise KeyboardInterrupt
        if str(step) == steps[1]:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand much more")
        return found(step)

    assert spend(interrupted) == steps[:3]
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('\n{"name": "half of a li')  # of a process that was killed
    assert spend(found) == [*steps[3:], steps[2]]  # what did not end is the last
    assert spend(found) == []
    report = (tmp_path / "report.md").read_text()
    assert f"| {steps[1]} | RuntimeError: RESOURCE_EXHAUSTED: out of memory |" in report
    assert "| smoke | exit status 2 |" in report
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    names = [json.loads(line)["name"] for line in lines if line.endswith("}")]
    assert names == ["smoke", *steps[:2], *steps[3:], steps[2]]


def test_the_first_questions_are_of_one_net():
    first, second, *_ = steps = plan()
    assert (first.depth, first.width, first.batch, first.precision) == (110, 16, 128, "float32")
    assert second.variant == METHOD
    sizes = {(step.depth, step.width, step.batch) for step in steps}
    assert len(sizes) == 8
    assert {(step.depth, step.width, step.batch) for step in steps[:12]} == {(110, 16, 128)}


@pytest.mark.slow
def test_a_program_of_nets_and_steps_does_what_steps_do_one_by_one():
    made = experiment(METHOD, 8, batch=8, width=2)
    programs = compile_steps(made)
    batch = constant_batch(programs, 8)
    expected, _ = programs.train_step(programs.init(), batch)
    expected, _ = programs.train_step(expected, batch)
    program, state = _several(
        Step(8, 2, 8, nets=3, steps=2), made, programs, programs.init(), batch
    )
    found, metrics = program(state, batch)
    assert metrics["loss"].shape == (3,)
    for one, several in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        for net in several:
            np.testing.assert_allclose(net, one, rtol=1e-4, atol=1e-5)


def test_without_pytorch_its_figures_are_left_out(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert measure(Step(form="PyTorch")) == {"left_out": "PyTorch is not installed"}
