"""The experiments: their configs, their reports, and those that train nothing, run."""

import dataclasses
import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from orthojax.commands.reproduce import Options
from orthojax.configs import cifar10_plain
from orthojax.errors import UserError
from orthojax.experiments import (
    ablation,
    appendix,
    constraint,
    curves,
    depth,
    figure2,
    figure3,
    figure4,
    figure5,
    figure6,
    gap,
    good_init,
    hard_cases,
    long_run,
    mnist,
    modulation,
    race,
    rivals,
    table2,
)
from orthojax.models import PlainNet, in_order
from orthojax.models.growth import log_growth
from orthojax.sites import SITE
from orthojax.storage.metrics import MetricWriter
from orthojax.storage.workdir import claim, write_json_atomic
from orthojax.training.experiment import build
from orthojax.training.optimizers import make_optimizer

PRESETS = ("cpu", "full")
CONFIGURED = (
    *(table2, figure5, gap, ablation, depth, rivals, constraint, hard_cases, long_run, modulation),
    *(good_init, mnist, race),
)


@pytest.fixture
def options(tmp_path):
    return Options("cpu", (0, 1), None, tmp_path / "runs" / "experiment_cpu")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_arm_is_a_config_that_can_be_built(preset, options):
    built = set()
    for experiment in CONFIGURED:
        jobs = experiment.jobs(dataclasses.replace(options, preset=preset))
        assert len(jobs) > 3
        workdirs = {}
        for name, job in jobs.items():
            run = next(job)
            config = run.config.to_json()
            # One directory, one config.
            assert workdirs.setdefault(run.workdir, config) == config, name
            if (kind := re.sub(r"\b\d[\d.e-]*", "0", config)) not in built:
                build(run.config, records=False)
                built.add(kind)  # others of its kind differ in numbers alone
    assert len(built) > 10


def test_a_penalty_decays_by_its_time_constants_in_a_run():
    transformation, schedule = make_optimizer(
        optimizer={"name": "sgd", "learning_rate": 0.05, "momentum": 0.9},
        schedule={"name": "linear", "warmup_steps": 20},
        regularizer={"name": "ortho", "coefficient": constraint.coefficient(0.05, 600, 0.9)},
        steps=600,
    )
    params = {"kernel": 1.001 * jnp.eye(4)}

    def step(carry, _):
        params, state = carry
        nothing = jax.tree.map(jnp.zeros_like, params)
        updates, state = transformation.update(nothing, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, transformation.init(params)), length=600)
    left = (params["kernel"][0, 0] - 1) / 0.001
    assert -math.log(left) == pytest.approx(constraint.TIME_CONSTANTS, rel=0.1)


def test_regularizers_do_in_shorter_runs_what_the_papers_does_in_its_own(options):
    paper = _strength(cifar10_plain.get_config("method=paper"))
    for preset in PRESETS:
        options = dataclasses.replace(options, preset=preset)
        assert _strength(curves.config(options, "plain44_ortho")) == pytest.approx(paper, rel=0.01)
        for method, rate in zip(long_run.METHODS, (0.02, 0.05, 0.1, 0.2), strict=True):
            config = long_run.config(options, method, 44, rate)
            assert _strength(config) == pytest.approx(paper, rel=0.02)  # it warms up
    for arm in ("modulated", "SGD + L2"):
        config = modulation.config(110, arm + modulation.STRONG)
        assert _strength(config) == pytest.approx(paper, rel=0.02)


def _strength(config):
    """λ Σ η of a config."""
    sections = config.optimizer, config.schedule, config.regularizer
    optimizer, schedule, regularizer = (section.to_dict() for section in sections)
    rate = make_optimizer(
        optimizer=optimizer, schedule=schedule, regularizer=regularizer, steps=config.steps
    )[1]
    return regularizer["coefficient"] * float(jax.vmap(rate)(jnp.arange(config.steps)).sum())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_nets_of_the_figures_can_be_built_those_on_imagenet_too(preset, options):
    options = dataclasses.replace(options, preset=preset)
    shapes = set()
    for name in curves.TITLES:
        config = curves.config(options, name)
        build(config, records=False)
        shapes.add((config.dataset.name, config.model.depth))
    assert shapes >= {("cifar10", 44), ("imagenet2012", 34), ("imagenet2012", 101)}


@pytest.fixture(params=["imagenet", "without imagenet"])
def reason(request, monkeypatch):
    """What the figures are told of ImageNet."""
    told = "not prepared in DIR" if request.param.startswith("without") else None
    monkeypatch.setattr(curves, "without_imagenet", lambda options: told)
    return told


def test_the_panel_of_imagenet_is_left_out_where_that_is_not_prepared(reason, options):
    for experiment in (figure5, figure6):
        arms = {name.split("_")[0] for name in experiment.jobs(options)}
        assert ("imagenet34" in arms) == (reason is None)


def test_missing_photographs_are_named(options):
    options = dataclasses.replace(options, data_dir=str(options.workdir))
    assert "imagenet2012" in curves.without_imagenet(options)


def test_filters_are_drawn_for_each_data_set(reason, options, monkeypatch):
    for name in curves.TITLES:
        directory = curves.shared(options).workdir / name / "seed0"
        directory.mkdir(parents=True)
        (directory / "record.json").write_text(json.dumps(record()))
    kernel = np.random.default_rng(0).normal(size=(7, 7, 3, 16))
    monkeypatch.setattr(figure6, "first_kernel", lambda workdir: kernel)
    figure6.report(options, dict.fromkeys(figure6.jobs(options), [record()]))
    text = (options.workdir / "report.md").read_text()
    assert (reason or "ResNet-34, orthonormal") in text
    drawn = {path.name for path in options.workdir.glob("figure6_*.png")}
    assert drawn == {"figure6_cifar10.png"} | ({"figure6_imagenet.png"} if not reason else set())


def test_figures_are_drawn_of_the_arms_that_are_done(reason, options, monkeypatch):
    name = "resnet110_l2"
    directory = curves.shared(options).workdir / name / "seed0"
    directory.mkdir(parents=True)
    (directory / "record.json").write_text(json.dumps(record()))
    with MetricWriter(directory) as writer:
        writer.write(100, "test", accuracy=0.5)
    monkeypatch.setattr(figure6, "first_kernel", lambda workdir: np.ones((3, 3, 3, 8)))
    for experiment in (figure5, figure6):
        experiment.report(options, {name: [record()]})
        text = (options.workdir / "report.md").read_text()
        assert "ResNet-110, He and L2" in text and "orthonormal |" not in text


def record(seed=0, accuracy=0.5, diverged=None):
    loss = math.inf if diverged else 0.1
    return {
        "seed": seed,
        "learning_rate": 0.01,
        "steps": 300,
        "test_accuracy": 0.0 if diverged else accuracy,
        "train_loss": loss,
        "orthonormality_error": 1e-3,
        "seconds": None if diverged else 5.0,
        "diverged": diverged,
    }


@pytest.mark.parametrize(
    "experiment", [table2, gap, ablation, depth, rivals, constraint, hard_cases, modulation, mnist]
)
def test_reports_hold_every_arm_its_spread_and_what_diverged(experiment, options):
    names = list(experiment.jobs(options))
    results = {name: [record(0, 0.5), record(1, 0.54)] for name in names}
    results[names[1]] = [record(0, diverged="at step 3"), record(1, diverged="at step 4")]
    searched = options.workdir / "arm" / "search"
    searched.mkdir(parents=True)
    (searched / "record.json").write_text(json.dumps(record()))
    experiment.report(options, results)
    text = (options.workdir / "report.md").read_text()
    assert text.count("52.00 ± 2.83") >= len(names) - 1 and "diverged" in text
    for picture in (line for line in text.splitlines() if line.startswith("![")):
        path = options.workdir / picture.partition("(")[2].rstrip(")")
        assert path.read_bytes().startswith(b"\x89PNG") and path.with_suffix(".svg").exists()
    lines = (options.workdir / "records.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"run": "arm/search", **record()}]


def test_table_2_says_what_was_not_run(options):
    table2.report(options, {("SGD", 44, "own"): [record()]})
    text = (options.workdir / "report.md").read_text()
    assert "| SGD | 84.14 | not run | 50.00 (at 0.01) |" in text and "110 layers:" not in text


@pytest.mark.parametrize(
    ("experiment", "reason"),
    [
        *((figure, "imagenet") for figure in (figure2, figure3, figure4, figure5)),
        (figure5, "without imagenet"),
    ],
    indirect=["reason"],
)
def test_figures_are_drawn_from_the_records_of_the_layers(experiment, options, reason):
    place = curves.shared(options)
    for name in curves.TITLES:
        for seed in options.seeds:
            workdir = place.workdir / name / f"seed{seed}"
            workdir.mkdir(parents=True)
            with MetricWriter(workdir) as writer:
                for step in range(40, 640, 40):
                    moments = [2.0 ** (layer - 42) for layer in range(43)]
                    kinds = dict.fromkeys(figure2.KINDS, 0.25)
                    writer.write(step, "layers", second_moment=moments, **kinds)
                    writer.write(step, "test", accuracy=step / 1000)
                    writer.write(step, "train", loss=1.0)
    results = {name: [record(0), record(1)] for name in curves.TITLES}
    experiment.report(options, results)
    text = (options.workdir / "report.md").read_text()
    expected = {
        figure2: "0.2500 | 0.2500 | 0.2500",
        figure3: "2.3e-13 | 2.3e-13",  # 2^-42
        figure4: "| 280 | 2.3e-13 | 4.8e-07",  # the paper's 30,000 of 64,000; 2^-21
        figure5: "50.00 ± 0.00",
    }
    assert expected[experiment] in text
    if experiment is figure5:
        assert ("ResNet-101, He and L2" in text) == (reason is None) and (reason or "") in text


def test_a_long_run_is_drawn_and_its_last_steps_averaged(options):
    results = {}
    for method in long_run.METHODS:
        results[f"{method},44"] = [record(seed, 0.5) for seed in options.seeds]
        for seed in options.seeds:
            workdir = options.workdir / f"{method}44" / f"lr0.01-steps300-seed{seed}"
            workdir.mkdir(parents=True)
            with MetricWriter(workdir) as writer:
                for step in range(50, 850, 50):  # of the last eight the mean is 0.625
                    writer.write(step, "train", accuracy=step / 1000, loss=1.0)
                writer.write(800, "test", accuracy=0.5)
    long_run.report(options, results)
    text = (options.workdir / "report.md").read_text()
    assert text.count("| 50.00 ± 0.00 | 62.5, 62.5 | 2 |") == len(long_run.METHODS)
    assert "| 110 |" not in text
    assert (options.workdir / "long_run.png").read_bytes().startswith(b"\x89PNG")
    curves = _curves(options.workdir)
    assert len(curves) == 2 * len(options.seeds) * len(long_run.METHODS)
    assert curves["paper44/lr0.01-steps300-seed1", "test"] == ([800], [50.0])
    assert curves["paper44/lr0.01-steps300-seed1", "train"][1][:3] == [5.0, 10.0, 15.0]


def test_the_race_has_two_rates_for_soap_and_is_drawn_against_cpu_time(options):
    nets, results = ("plain, carrying, PReLU", "residual, last scale 0"), {}
    for net, (optimizer, rest) in itertools.product(nets, (("SGD", None), ("SOAP", 0.1))):
        records = [
            record(seed) | {"cpu_seconds": 6.0, "train_accuracy": 0.625} for seed in options.seeds
        ]
        for made in records:
            if rest is not None:
                made["rest_rate"] = rest
            directory = race.directory(options, 44, "short", net, optimizer, rest)
            with MetricWriter(_made(directory / f"lr0.01-steps300-seed{made['seed']}")) as writer:
                writer.write(150, "test", accuracy=0.25)
                writer.write(300, "test", accuracy=0.5)
        results[f"44, short, {net}, {optimizer}"] = records
    race.report(options, results)
    text = (options.workdir / "report.md").read_text()
    for net in nets:
        assert f"| {net}, SGD | 0.01 | 50.00 ± 0.00 | 50.0, 50.0 | 62.5 | 6 | 2 |" in text
        assert f"| {net}, SOAP | 0.01 / 0.1 | 50.00 ± 0.00 | 50.0, 50.0 | 62.5 | 6 | 2 |" in text
    assert (options.workdir / "race_44_short.png").read_bytes().startswith(b"\x89PNG")
    assert set(map(str, _curves(options.workdir).values())) == {"([150, 300], [25.0, 50.0])"}


def test_soap_searches_the_kernels_rate_and_then_that_of_the_rest(options):
    """Of losses with a minimum at 0.005 and 0.2, from 0.002 and 0.1; SGD has one rate."""
    job = race.jobs(options)["44, short, plain, carrying, PReLU, SOAP"]
    tried, run = [], next(job)
    with pytest.raises(StopIteration) as end:
        while True:
            optimizer = run.config.optimizer
            rates = optimizer.learning_rate, optimizer.rest.learning_rate
            tried.append((*rates, run.config.seed))
            loss = abs(math.log(rates[0] / 0.005)) + abs(math.log(rates[1] / 0.2))
            run = job.send({**record(run.config.seed), "train_loss": loss})
    assert tried[-2:] == [(0.005, 0.2, 0), (0.005, 0.2, 1)]
    assert {(kernels, rest) for kernels, rest, _ in tried[:4]} == {
        *((kernels, 0.1) for kernels in (0.001, 0.002, 0.005, 0.01)),
    }
    assert len(end.value.value) == 2


def _made(directory):
    directory.mkdir(parents=True)
    return directory


def _curves(workdir):
    """`(run, curve)` -> `(steps, values)`, of the file beside the report."""
    lines = map(json.loads, (workdir / "curves.jsonl").read_text().splitlines())
    return {(line["run"], line["curve"]): (line["steps"], line["values"]) for line in lines}


def test_what_keeps_kernels_is_told_by_orthonormality_and_growth_along_the_run(options):
    results = {}
    for arm in itertools.product(good_init.KEPT, good_init.MODULATED):
        results[arm] = [record(seed, 0.5) for seed in options.seeds]
        for seed in options.seeds:
            workdir = options.workdir / "_".join(arm) / f"lr0.01-steps300-seed{seed}"
            workdir.mkdir(parents=True)
            with MetricWriter(workdir) as writer:
                for step in (100, 300):
                    layers = {
                        "orthonormality_error": step / 1000,
                        "log_growth": math.log(10 * step),
                    }
                    writer.write(step, "layers", **layers)
                writer.write(300, "test", accuracy=0.5)
    good_init.report(options, results)
    text = (options.workdir / "report.md").read_text()
    assert text.count("| 50.00 ± 0.00 | 50.0, 50.0 | 0.100 | 0.3, 0.3 | 3.5, 3.5 |") == len(results)
    assert (options.workdir / "good_init.png").read_bytes().startswith(b"\x89PNG")
    curves = _curves(options.workdir)
    assert len(curves) == 3 * len(options.seeds) * len(results)
    # log10(1,000) and log10(3,000), to four digits
    assert curves["L2_on/lr0.01-steps300-seed0", "growth"] == ([100, 300], [3.0, 3.477])


def test_an_arm_that_diverged_is_reported_without_its_end(options):
    workdir = options.workdir / "L2_off" / "lr0.01-steps300-seed0"
    workdir.mkdir(parents=True)
    with MetricWriter(workdir) as writer:
        writer.write(100, "layers", orthonormality_error=0.1, log_growth=1.0)
    good_init.report(options, {("L2", "off"): [record(diverged="at step 123")]})
    assert "| diverged | 0.0 | inf |  |  |" in (options.workdir / "report.md").read_text()


def test_growth_is_that_of_the_unmodulated_error():
    net = PlainNet(depth=8, width=2, num_classes=5, kernel_init="orthonormal", bn_bias=0.5)
    images = jax.random.normal(jax.random.key(1), (4, 4, 4, 3))
    found = log_growth(net, jax.random.key(0), images)
    observed = net.clone(modulated=True)

    @jax.jit
    def errors(key):
        variables = observed.init(key, images[:1], train=False)

        def loss(params):
            state = {**variables, "params": params}
            logits, _ = observed.apply(state, images, train=True, mutable=["batch_stats"])
            return jnp.sum(logits * jax.random.normal(jax.random.fold_in(key, 1), logits.shape))

        return jax.grad(loss)(variables["params"])

    grads = in_order(errors(jax.random.key(0)))
    squares = np.log([leaf[0] for path, leaf in grads if path.endswith(SITE)])
    np.testing.assert_allclose(found, squares[:-1] - squares[1:], rtol=1e-3, atol=1e-4)


def test_growth_does_not_overflow_where_the_error_would():
    """1.467^300 is 1e50: beyond float32."""
    net = PlainNet(depth=302, width=8, num_classes=5, kernel_init="delta_orthonormal")
    images = jax.random.normal(jax.random.key(1), (16, 4, 4, 3))
    found = log_growth(net, jax.random.key(0), images)
    assert jnp.isfinite(found).all() and jnp.sum(found) > math.log(1e38)


@pytest.mark.parametrize("m", [3, 32])
def test_the_jacobian_of_batch_normalization(m):
    x = np.random.default_rng(m).normal(size=m)
    expected, rho = appendix.equation_12(x)
    found = jax.jit(appendix.jacobian)(x.astype(np.float32))
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


def test_the_plan_is_told_before_anything_is_trained(program, tmp_path, monkeypatch):
    def stop(jobs):
        raise UserError("stop")

    monkeypatch.setattr("orthojax.experiments.sweep.work", stop)
    options = Options("cpu", (0, 1), None, tmp_path / "depth_cpu")
    run = next(depth.jobs(options)[44])
    claim(run.workdir, run.config)
    write_json_atomic(run.workdir / "record.json", record())
    done = program("reproduce", "depth", "--seeds=2", f"--workdir={tmp_path}")
    *plan, last = done.err.splitlines()
    assert done.code == 2 and last == "error: stop"
    assert plan[0].startswith("depth: 5 arms, 0 finished; 1 runs done, 24 left, and more")
    assert plan[1:] == [
        f"  {layers}: {int(layers == 44)} done, {5 - (layers == 44)} left"
        for layers in depth.DEPTHS
    ]


@pytest.mark.parametrize("name", ["table2", "figure5", "long_run", "good_init"])
def test_a_report_on_nothing_is_an_error_in_one_line(program, tmp_path, name):
    done = program("reproduce", name, "--finished", f"--workdir={tmp_path}")
    assert done.code == 2 and not list(tmp_path.iterdir())
    line = done.err.splitlines()[-1]
    assert (
        f"no arm of `{name}` is finished in {tmp_path}" in line and "leave --finished out" in line
    )


def test_a_missing_data_set_is_an_error_in_one_line(program, tmp_path):
    flags = (f"--workdir={tmp_path}", f"--data_dir={tmp_path / 'nothing'}")
    done = program("reproduce", "figure5", *flags)
    assert done.code == 2 and "cifar10" in done.err.splitlines()[-1]
