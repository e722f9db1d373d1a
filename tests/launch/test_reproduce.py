"""The experiments: their arms, their reports, and those that train nothing, run."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orthojax.benchmarks.environment import commit
from orthojax.commands.reproduce import AGAINST, BEYOND, FIGURES, Options, load
from orthojax.configs import cifar10_plain
from orthojax.errors import UserError
from orthojax.experiments import appendix, arms, constraint, figures, long_run, modulation
from orthojax.storage.metrics import MetricWriter
from orthojax.storage.workdir import claim, write_json_atomic
from orthojax.training.experiment import build
from orthojax.training.optimizers import make_optimizer

TRAINED = ("table2", *FIGURES, *BEYOND, *AGAINST)


@pytest.fixture
def options(tmp_path):
    """Of an experiment."""

    def make(name, preset="cpu", data_dir=None):
        return Options(name, preset, (0, 1), data_dir, tmp_path / "runs" / f"{name}_{preset}")

    return make


@pytest.fixture(params=[None])
def missing(request, monkeypatch):
    """Why ImageNet is missing, or None where the figures find it prepared."""
    monkeypatch.setattr(figures, "without_imagenet", lambda options: request.param)
    return request.param


@pytest.mark.parametrize("preset", ["cpu", pytest.param("full", marks=pytest.mark.slow)])
def test_every_arm_is_a_config_that_can_be_built(preset, options, missing):
    built, workdirs = set(), {}
    for experiment in TRAINED:
        for arm, job in load(experiment).jobs(options(experiment, preset)).items():
            run = next(job)
            # One directory, one config.
            assert workdirs.setdefault(run.workdir, run.config) == run.config, arm
            sections = json.loads(run.config.to_json()).items()
            kinds = {re.sub(r"\b\d[\d.e-]*", "0", json.dumps(section)) for section in sections}
            if not kinds <= built:
                build(run.config, records=False)
                built |= kinds  # others differ in numbers, or in what goes together


def strength(config):
    """λ Σ η of a config."""
    sections = {name: config[name].to_dict() for name in ("optimizer", "schedule", "regularizer")}
    _, rate = make_optimizer(**sections, steps=config.steps)
    return config.regularizer.coefficient * float(jax.vmap(rate)(jnp.arange(config.steps)).sum())


@pytest.mark.parametrize("preset", ["cpu", "full"])
def test_regularizers_do_in_shorter_runs_what_the_papers_does_in_its_own(preset, options):
    matched = [
        figures.config(options("figure5", preset), "plain44_ortho"),
        long_run.config(options("long_run", preset), "baseline", 44, 0.2),
        modulation.config(110, "modulated" + modulation.STRONG),
    ]
    paper = strength(cifar10_plain.get_config("method=paper"))
    for config in matched:
        assert strength(config) == pytest.approx(paper, rel=0.02)  # some warm up


def test_a_penalty_decays_by_its_time_constants_in_a_run(options):
    config = constraint.config(
        options("constraint"), "digits", 44, "near-isometric", "penalty", 0.05
    )
    sections = {name: config[name].to_dict() for name in ("optimizer", "schedule", "regularizer")}
    transformation, _ = make_optimizer(**sections, steps=config.steps)
    params = {"kernel": 1.001 * jnp.eye(4)}

    def step(carry, _):
        params, state = carry
        nothing = jax.tree.map(jnp.zeros_like, params)
        updates, state = transformation.update(nothing, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, transformation.init(params)
    (params, _), _ = jax.lax.scan(step, carry, length=config.steps)
    left = (params["kernel"][0, 0] - 1) / 0.001
    assert -math.log(left) == pytest.approx(arms.TIME_CONSTANTS, rel=0.1)


def test_soap_searches_the_kernels_rate_and_then_that_of_the_rest(options):
    """Of losses with a minimum at 0.005 and 0.2, from 0.002 and 0.1; SGD has one rate."""
    job = load("race").jobs(options("race"))[44, "short", "plain, carrying, PReLU", "SOAP"]
    tried, run = [], next(job)
    with pytest.raises(StopIteration) as end:
        while True:
            optimizer = run.config.optimizer
            rates = optimizer.learning_rate, optimizer.rest.learning_rate
            tried.append((*rates, run.config.seed))
            loss = abs(math.log(rates[0] / 0.005)) + abs(math.log(rates[1] / 0.2))
            run = job.send({"train_loss": loss})
    assert tried[-2:] == [(0.005, 0.2, 0), (0.005, 0.2, 1)] and len(end.value.value) == 2
    assert {rates[:2] for rates in tried[:4]} == {
        (kernels, 0.1) for kernels in (0.001, 0.002, 0.005, 0.01)
    }


def trained(workdir, accuracy=0.5, diverged=None, measured=15, **more):
    """The record of a run, which has measured so often what is in its directory."""
    workdir.mkdir(parents=True)
    with MetricWriter(workdir) as writer:
        for step in range(40, 40 + 40 * measured, 40):
            writer.write(step, "train", accuracy=step / 1000, loss=1.0)
            moments = [2.0 ** (layer - 42) for layer in range(43)]
            layers = dict.fromkeys(figures.CORRELATIONS, 0.25) | {"second_moment": moments}
            layers |= {"orthonormality_error": step / 1000, "log_growth": math.log(10) * step}
            writer.write(step, "layers", **layers)
            if not diverged:
                writer.write(step, "test", accuracy=step / 1000)
    nothing = {"test_accuracy": 0.0, "train_loss": math.inf, "seconds": None, "cpu_seconds": None}
    record = {"learning_rate": 0.01, "steps": 300, "orthonormality_error": 1e-3, "seed": 0}
    record |= {"test_accuracy": accuracy, "train_loss": 0.1, "seconds": 5.0, "cpu_seconds": 6.0}
    record |= {"train_accuracy": 0.625, "diverged": diverged, "workdir": workdir, **more}
    return record | nothing if diverged else record


# What stands in the row of every arm that did not diverge, in that of every run in figures 2 to 4.
CELLS = {
    **dict.fromkeys(TRAINED, "52.00 ± 2.83"),
    "figure2": "0.2500 | 0.2500 | 0.2500",
    "figure3": "2.3e-13 | 2.3e-13",  # 2^-42
    "figure4": "| 280 | 2.3e-13 | 4.8e-07",  # the paper's 30,000 of 64,000; 2^-21
    "figure6": "| 3×3 | 8 |",
    "constraint": "52.00 ± 2.83 | 50.0, 54.0 | 0.100 | 1.0e-03 |",
    "depth": "0.01 | 52.00 ± 2.83 | 5 s | 2 |",
    "good_init": "50.0, 54.0 | 0.100 | 0.6, 0.6 | 6e+02, 6e+02 |",
    "long_run": "52.00 ± 2.83 | 46.0, 46.0 | 2 |",  # the mean of the last eight
    "race": "0.01 / 0.1 | 52.00 ± 2.83 | 50.0, 54.0 | 62.5 | 6 | 2 |",
}


@pytest.mark.parametrize("experiment", TRAINED)
def test_reports_hold_every_arm_its_spread_and_what_diverged(
    experiment, options, missing, monkeypatch
):
    monkeypatch.setattr(figures, "first_kernel", lambda workdir: np.ones((3, 3, 3, 8)))
    told = options(experiment)
    runs = figures.shared_runs(told) if experiment in FIGURES else told.workdir
    results = {}
    for index, (name, job) in enumerate(list(load(experiment).jobs(told).items())[:20]):
        more = {"rest_rate": 0.1, "steps": next(job).config.steps}
        for k, accuracy in enumerate((0.5, 0.54)):
            if index == 1:
                more |= {"diverged": "at step 50", "measured": k}
            run = trained(runs / f"{index}" / f"{k}", accuracy, **more)
            results.setdefault(name, []).append(run)
    write_json_atomic(runs / "0" / "0" / "record.json", {"seed": 0})
    load(experiment).report(told, results)
    text = (told.workdir / "report.md").read_text()
    assert text.count(CELLS[experiment]) >= len(results) - 1
    assert "diverged" in text or experiment in ("figure2", "figure3", "figure4", "figure6")
    assert "seeds: 0, 1" in text and commit() in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures or experiment in ("mnist", "hard_cases")
    for picture in (told.workdir / name for name in pictures):
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.with_suffix(".svg").exists()
    assert json.loads((told.workdir / "records.jsonl").read_text()) == {"run": "0/0", "seed": 0}
    if experiment in ("long_run", "good_init", "race"):
        curves = [*map(json.loads, (told.workdir / "curves.jsonl").read_text().splitlines())]
        test = next(c for c in curves if c["run"] == "0/1" and c["curve"] == "test")
        assert test["steps"][:2] == [40, 80] and test["values"][:2] == [4.0, 8.0]
        assert len(curves) == len(results) * 2 * len({c["curve"] for c in curves})


def test_reports_are_of_the_arms_that_are_done(options, missing, tmp_path):
    told = options("table2")
    load("table2").report(told, {("SGD", 44, "own"): [trained(tmp_path / "sgd")]})
    text = (told.workdir / "report.md").read_text()
    assert "| SGD | 84.14 | not run | 50.00 (at 0.01) |" in text and "110 layers:" not in text
    told = options("figure5")
    load("figure5").report(told, {"resnet110_l2": [trained(tmp_path / "resnet")]})
    text = (told.workdir / "report.md").read_text()
    assert "ResNet-110, He and L2" in text and "orthonormal |" not in text


@pytest.mark.parametrize("missing", ["not prepared in DIR"], indirect=True)
@pytest.mark.parametrize("experiment", ["figure5", "figure6"])
def test_imagenet_is_left_out_where_it_is_not_prepared(experiment, missing, options, monkeypatch):
    monkeypatch.setattr(figures, "first_kernel", lambda workdir: np.ones((3, 3, 3, 8)))
    told = options(experiment)
    results = {name: [trained(told.workdir / name)] for name in load(experiment).jobs(told)}
    assert results and not any(name.startswith("imagenet") for name in results)
    load(experiment).report(told, results)
    assert missing in (told.workdir / "report.md").read_text()


def test_missing_photographs_are_named(options, tmp_path):
    told = options("figure5", data_dir=str(tmp_path))
    assert "imagenet2012" in figures.without_imagenet(told)


@pytest.mark.parametrize("m", [3, 32])
def test_the_jacobian_of_batch_normalization(m):
    x = np.random.default_rng(m).normal(size=m)
    expected, rho = appendix.equation_12(x)
    found = appendix.jacobian(x.astype(np.float32))
    np.testing.assert_allclose(found, expected, atol=2e-5 * rho)
    eigenvalues = np.sort(np.linalg.eigvalsh(expected)) / rho
    predicted = appendix.EPSILON / (x.var() + appendix.EPSILON)
    np.testing.assert_allclose(eigenvalues, [0, predicted, *[1] * (m - 2)], atol=1e-12)


def test_an_experiment_by_one_command(program, tmp_path, monkeypatch):
    monkeypatch.setattr(appendix, "BATCHES", (4,))
    done = program("reproduce", "appendix", "--resume", f"--workdir={tmp_path}")
    assert done.code == 2 and str(tmp_path) in done.err and not list(tmp_path.iterdir())
    workdir = tmp_path / "appendix_cpu"
    assert program("reproduce", "appendix", "--seeds=2", f"--workdir={tmp_path}").code == 0
    text = (workdir / "report.md").read_text()
    assert "command: python launch/reproduce.py appendix --seeds=2" in text
    assert len((workdir / "records.jsonl").read_text().splitlines()) == 2
    (workdir / "report.md").unlink()
    assert program("reproduce", "appendix", "--resume", f"--workdir={tmp_path}").code == 0
    assert (workdir / "report.md").exists()


def test_the_plan_is_told_before_anything_is_trained(program, options, monkeypatch):
    def stop(jobs):
        raise UserError("stop")

    monkeypatch.setattr("orthojax.experiments.sweep.work", stop)
    told = options("depth")
    run = next(load("depth").jobs(told)[44])
    claim(run.workdir, run.config)
    write_json_atomic(run.workdir / "record.json", {"train_loss": 0.1})
    flags = ("--seeds=2", f"--workdir={told.workdir.parent}")
    done = program("reproduce", "depth", *flags)
    *plan, last = done.err.splitlines()
    assert done.code == 2 and last == "error: stop"
    assert plan[0].startswith("depth: 5 arms, 0 finished; 1 runs done, 24 left, and more")
    assert plan[1:3] == ["  20: 0 done, 5 left", "  44: 1 done, 4 left"] and len(plan) == 6
    done = program("reproduce", "depth", "--only=*4*", *flags)
    assert [line.split(":")[0] for line in done.err.splitlines()[1:-1]] == ["  44", "  1004"]


def test_a_report_on_nothing_is_an_error_in_one_line(program, tmp_path):
    done = program("reproduce", "good_init", "--finished", f"--workdir={tmp_path}")
    assert done.code == 2 and not list(tmp_path.iterdir())
    line = done.err.splitlines()[-1]
    assert f"no arm of `good_init` is finished in {tmp_path}" in line
    assert "leave --finished out" in line


def test_a_missing_data_set_is_an_error_in_one_line(program, tmp_path):
    flags = (f"--workdir={tmp_path}", f"--data_dir={tmp_path / 'nothing'}")
    done = program("reproduce", "figure5", *flags)
    assert done.code == 2 and "cifar10" in done.err.splitlines()[-1]
