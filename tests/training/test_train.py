"""Training end to end: on a tiny net, in this process and in ones that are killed."""

import errno
import json
import logging.handlers
import os
import pathlib
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from orthojax.configs import (
    cifar10_plain,
    cifar10_resnet,
    digits_depth,
    digits_plain110,
    digits_plain110_sgd,
    imagenet_plain,
    imagenet_resnet,
)
from orthojax.errors import ConfigError, DatasetError, DivergenceError, WorkdirError
from orthojax.modulator import find_state
from orthojax.storage.metrics import MetricWriter, read_metrics
from orthojax.training.compiled import compile_steps, lower_train_step
from orthojax.training.experiment import build
from orthojax.training.train import train_and_evaluate
from orthojax.training.trainer import evaluate

ROOT = pathlib.Path(__file__).parents[2]


def tiny_config(**changes) -> ConfigDict:
    config = digits_plain110.get_config("depth=8,steps=30")
    config.model.width = 4
    config.batch_size = 32
    config.log_every, config.eval_every, config.checkpoint_every = 2, 6, 4
    config.mesh.data = 1
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    logged = logging.handlers.BufferingHandler(10**6)
    logging.getLogger("jax").addHandler(logged)
    with jax.log_compiles():
        summary = train_and_evaluate(tiny_config(), workdir)
    logging.getLogger("jax").removeHandler(logged)
    messages = [record.getMessage() for record in logged.buffer]
    compiled = [line for line in messages if line.startswith("Finished XLA compilation")]
    (workdir.parent / "compiled.json").write_text(json.dumps(compiled))
    return workdir, summary


def final_state(workdir, config=None):
    experiment = build(config or tiny_config())
    programs = compile_steps(experiment)
    from orthojax.storage.checkpoint import Checkpointer

    with Checkpointer(workdir / "checkpoints") as checkpointer:
        return experiment, programs, checkpointer.restore_latest(programs.abstract_state)


def assert_bitwise_equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(jax.device_get(actual)),
        jax.tree.leaves(jax.device_get(expected)),
        strict=True,
    )
    different = [jax.tree_util.keystr(path) for (path, a), b in pairs if a.tobytes() != b.tobytes()]
    assert not different


def test_writes_what_it_promises(finished):
    workdir, summary = finished
    names = {path.name for path in workdir.iterdir()}
    assert {"config.json", "environment.json", "metrics.jsonl", "summary.json"} < names
    assert {"curves.png", "checkpoints"} < names
    assert json.loads((workdir / "summary.json").read_text()) == summary
    assert set(summary) >= {
        *("test_accuracy", "steps", "seconds", "images_per_second", "compile_seconds")
    }
    assert (workdir / "curves.png").read_bytes().startswith(b"\x89PNG")
    records = read_metrics(workdir)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(2, 31, 2))
    assert [r["step"] for r in records if r["kind"] == "test"] == [6, 12, 18, 24, 30]
    steps = {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
    assert steps == {24, 28, 30}


def test_no_step_is_compiled_twice(finished):
    compiled = json.loads((finished[0].parent / "compiled.json").read_text())
    for step in ("train_step", "eval_step"):
        assert sum(step in name for name in compiled) == 1, compiled


def test_every_step_measures_at_every_site(finished):
    workdir, _ = finished
    _, _, restored = final_state(workdir)
    state = find_state(restored.state.opt_state)
    assert state.count == state.measured == 30
    assert all((moments > 0).all() for moments in jax.tree.leaves(state.moments))


def test_evaluation_is_exact(finished):
    """Against one batch of the whole split, which needs no padding."""
    workdir, summary = finished
    experiment, programs, restored = final_state(workdir)
    split = experiment.dataset.test
    assert len(split) % experiment.settings.batch_size  # so that there is padding
    variables = {
        "params": restored.state.params,
        "batch_stats": restored.state.batch_stats,
    }
    images = (split.images / 255 - experiment.dataset.mean) / experiment.dataset.std
    logits = experiment.net.apply(variables, images.astype(np.float32), train=False)
    logits = np.asarray(logits, np.float64)
    accuracy = np.mean(np.argmax(logits, -1) == split.labels)
    order = np.argsort(-logits, axis=-1)[:, :5]
    top5_accuracy = np.mean((order == split.labels[:, None]).any(-1))
    logsumexp = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    loss = np.mean(logsumexp - logits[np.arange(len(split)), split.labels])
    test = evaluate(experiment, programs, restored.state)
    assert test["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert test["top5_accuracy"] == pytest.approx(top5_accuracy, abs=1e-9)
    assert accuracy < top5_accuracy < 1
    assert test["loss"] == pytest.approx(loss, rel=1e-4)
    assert summary["test_accuracy"] == test["accuracy"]


def test_first_layer_filters_of_a_run_are_drawn(finished, tmp_path, capsys):
    workdir, _ = finished
    main = runpy.run_path(str(ROOT / "launch" / "draw_filters.py"))["main"]
    assert main([str(tmp_path / "filters.png"), f"ours={workdir}"]) == 0
    assert (tmp_path / "filters.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main([str(tmp_path / "none.png"), f"ours={tmp_path}"])
    assert "is not TITLE=WORKDIR of a run" in capsys.readouterr().err


def files_of(workdir):
    return {
        p: p.read_bytes() for p in workdir.rglob("*") if p.name != "environment.json" if p.is_file()
    }


@pytest.mark.parametrize("checkpoints", ["there", "deleted"])
def test_a_finished_run_is_left_as_it_is(finished, tmp_path, checkpoints, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    if checkpoints == "deleted":
        shutil.rmtree(workdir / "checkpoints")
    before = files_of(workdir)
    assert train_and_evaluate(tiny_config(log_every=5), workdir) == finished[1]
    told = capsys.readouterr().err
    assert "has finished its 30 steps" in told and ("gone" in told) == (checkpoints == "deleted")
    config = {workdir / "config.json": (workdir / "config.json").read_bytes()}  # of log_every
    assert files_of(workdir) == before | config


def test_more_steps_and_other_intervals_are_the_same_run_and_longer(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    longer = tiny_config(
        steps=34, log_every=1, eval_every=2, checkpoint_every=2, keep_checkpoints=1
    )
    summary = train_and_evaluate(longer, workdir)
    assert summary["resumed_from_step"] == 30 and summary["steps"] == 34
    assert "steps=30 before, 34 now" in capsys.readouterr().err
    assert json.loads((workdir / "summary-30.json").read_text()) == finished[1]
    records = read_metrics(workdir)
    assert records[: len(read_metrics(finished[0]))] == read_metrics(finished[0])
    assert [r["step"] for r in records if r["kind"] == "train"][-4:] == [31, 32, 33, 34]
    assert json.loads((workdir / "config.json").read_text())["steps"] == 34
    with pytest.raises(WorkdirError, match="of step 34, and steps=20 is less"):
        train_and_evaluate(tiny_config(steps=20), workdir)


def test_without_its_checkpoints_a_run_begins_anew_and_keeps_the_record(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "summary.json").unlink()
    before = (workdir / "metrics.jsonl").read_bytes()
    summary = train_and_evaluate(tiny_config(), workdir)
    assert summary["test_accuracy"] == finished[1]["test_accuracy"]
    assert "there is no checkpoint" in capsys.readouterr().err
    assert (workdir / "metrics-1.jsonl").read_bytes() == before
    assert (workdir / "metrics.jsonl").read_bytes() == before


def test_a_full_disk_is_told_in_three_lines_and_nothing_is_lost(tmp_path, monkeypatch):
    workdir = tmp_path / "run"
    write, calls = MetricWriter.write, []

    def full(self, step, *arguments, **values):
        calls.append(step)
        if step > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(workdir / "metrics.jsonl"))
        return write(self, step, *arguments, **values)

    monkeypatch.setattr(MetricWriter, "write", full)
    with pytest.raises(WorkdirError, match="No space left on device.*\n.*make room") as error:
        train_and_evaluate(tiny_config(), workdir)
    assert len(str(error.value).splitlines()) <= 3
    monkeypatch.setattr(MetricWriter, "write", write)
    assert train_and_evaluate(tiny_config(), workdir)["resumed_from_step"] == 8


def test_the_step_is_compiled_once(finished, tmp_path):
    """No compilation at all after the first checkpoint of a run, whatever is logged or saved."""
    del finished
    compiled = []

    def listen(event, duration, **kwargs):
        del duration
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs.get("fun_name", event))

    experiment = build(tiny_config())
    programs = compile_steps(experiment)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        train_and_evaluate(tiny_config(), tmp_path / "run")
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    steps = [name for name in compiled if "train_step" in str(name)]
    assert len(steps) <= 1, compiled
    # The compiled program takes no other shapes: a second compilation cannot hide.
    state = programs.init()
    batch = {"image": np.zeros((31, 8, 8, 1), np.uint8), "label": np.zeros(31, np.int32)}
    with pytest.raises(TypeError):
        programs.train_step(state, batch)


def command(workdir, *overrides):
    return [
        *(sys.executable, str(ROOT / "launch" / "train.py")),
        f"--config={ROOT / 'configs' / 'digits_plain110.py'}:depth=8,steps=30",
        f"--workdir={workdir}",
        *("--config.model.width=4", "--config.batch_size=32", "--config.mesh.data=1"),
        *("--config.log_every=2", "--config.eval_every=6", "--config.checkpoint_every=4"),
        *overrides,
    ]


def test_what_was_compiled_is_kept_for_the_next_start(tmp_path):
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    del environment["JAX_COMPILATION_CACHE_DIR"]
    for seed in (0, 1):
        run = command(tmp_path / f"run{seed}", "--config.steps=1", f"--config.seed={seed}")
        subprocess.run(run, check=True, capture_output=True, env=environment)
    kept = [path.name for path in (tmp_path / "orthojax" / "xla").iterdir()]
    assert sum("train_step" in name and name.endswith("-cache") for name in kept) == 1, kept


def launch(workdir, *overrides, until=None, send=None):
    """Runs launch/train.py; when a progress line contains `until`, sends the signal `send`."""
    process = subprocess.Popen(
        command(workdir, *overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if until and until in line:
            process.send_signal(send)
            until = None
    return process.wait(timeout=300), "".join(lines)


def test_killed_and_resumed_equals_undisturbed_bit_for_bit(finished, tmp_path):
    undisturbed, _ = finished
    # By step 10 the save of step 8 has begun, so that of step 4 has finished.
    code, output = launch(tmp_path / "run", until="step 10/30", send=signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    code, output = launch(tmp_path / "run")
    assert code == 0, output
    assert "resuming" in output
    assert_bitwise_equal(final_state(tmp_path / "run")[2].state, final_state(undisturbed)[2].state)
    assert read_metrics(tmp_path / "run") == read_metrics(undisturbed)


def test_signals_save_before_leaving(finished, tmp_path):
    undisturbed, _ = finished
    every = "--config.log_every=1"  # more moments at which a line is seen
    signals = (
        (signal.SIGTERM, "step 2/30"),
        (signal.SIGHUP, "step 7/30"),
        (signal.SIGINT, "step 12/30"),
    )
    for number, until in signals:
        code, output = launch(tmp_path / "run", every, until=until, send=number)
        assert code == 128 + number, output
        assert "run the same command again" in output
    saved = {int(p.name) for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit()}
    assert 12 <= max(saved) < 30
    config = tiny_config(log_every=1)
    train_and_evaluate(config, tmp_path / "run")
    assert_bitwise_equal(
        final_state(tmp_path / "run", config)[2].state, final_state(undisturbed)[2].state
    )


def test_divergence_stops_with_a_message_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny_config()
    config.optimizer.learning_rate = 1e30
    config.schedule.warmup_steps = 0
    with pytest.raises(DivergenceError, match="diverged at step .*learning_rate"):
        train_and_evaluate(config, tmp_path / "run")
    saved = [p for p in (tmp_path / "run/checkpoints").iterdir() if p.name.isdigit()]
    for checkpoint in saved:
        assert int(checkpoint.name) < 30


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(finished, tmp_path):
    undisturbed, _ = finished
    workdir = tmp_path / "run"
    shutil.copytree(undisturbed, workdir)
    newest = workdir / "checkpoints" / "30"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="step 30 is unreadable.*from step 28"):
        summary = train_and_evaluate(tiny_config(), workdir)
    assert summary["resumed_from_step"] == 28
    assert_bitwise_equal(final_state(workdir)[2].state, final_state(undisturbed)[2].state)


def test_workdir_of_another_config_is_refused_and_untouched(finished):
    workdir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(WorkdirError, match=r"optimizer.learning_rate: 0.005 -> 0.5"):
        config = tiny_config()
        config.optimizer.learning_rate = 0.5
        train_and_evaluate(config, workdir)
    assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"optimizer.learnin_rate": 0.1}, ConfigError, "did you mean `optimizer.learning_rate`"),
        ({"model.depht": 8}, ConfigError, r"`model.depht`; did you mean `model.depth`"),
        ({"model.depth": 9}, ConfigError, r"depth=9 is not 6n \+ 2.*8 and 14"),
        ({"model.name": "PlaneNet"}, ConfigError, "PlainNet, ResNet"),
        ({"modulation.tolerence": 0.1}, ConfigError, "`modulation.tolerance`"),
        ({"modulation.decay": 2.0}, ConfigError, r"modulation.*decay=2.0 must be in \[0, 1\)"),
        ({"regularizer.name": "orto"}, ConfigError, "did you mean `ortho`.*ortho, l2, none"),
        ({"dataset.name": "digit"}, DatasetError, "digits"),
        ({"batch_size": 2048}, DatasetError, "2048.*1437"),
        ({"dtype": "float33"}, ConfigError, "dtype.*float33"),
        ({"steps": 0}, ConfigError, "`steps` is 0"),
        ({"seed": -1}, ConfigError, "`seed` is -1"),
        ({"seed": 2**32}, ConfigError, "`seed` is 4294967296"),
        ({"keep_checkpoints": 0}, ConfigError, "`keep_checkpoints` is 0"),
        ({"dtype": "float16", "modulation": None}, ConfigError, "float16.*`loss_scale`.*bfloat16"),
        ({"dtype": "float64"}, ConfigError, "`dtype` is float64"),
        ({"dtype": "int32"}, ConfigError, "`dtype` is int32"),
        ({"model.width": 0}, ConfigError, "`model.width` is 0"),
        ({"model.bn_bias": 1e30}, ConfigError, "`model.bn_bias` is 1e.30"),
        ({"model.bn_bias": float("nan")}, ConfigError, "`model.bn_bias` is nan"),
        ({"optimizer.learning_rate": -0.1}, ConfigError, "`optimizer.learning_rate` is -0.1"),
        ({"optimizer.momentum": 1.5}, ConfigError, "`optimizer.momentum` is 1.5.*less than 1"),
        ({"regularizer.coefficient": -1.0}, ConfigError, "`regularizer.coefficient` is -1.0"),
        ({"schedule.warmup_steps": 31}, ConfigError, "`schedule.warmup_steps` is 31.*steps=30"),
        ({"schedule.warmup_steps": -1}, ConfigError, "`schedule.warmup_steps` is -1"),
        ({"schedule.boundaries": (0.8, 0.5)}, ConfigError, "ascending order"),
        ({"schedule.boundaries": (0.5, 1.5)}, ConfigError, "from 0 to 1"),
        ({"schedule.boundaries": (float("nan"),)}, ConfigError, "`schedule.boundaries`"),
        ({"schedule.factor": 0.0}, ConfigError, "`schedule.factor` is 0.0"),
        ({"mesh.data": 64}, ConfigError, "mesh.data=64.*there are 8"),
        ({"step": 3}, ConfigError, "unknown key `step`; did you mean `steps`"),
    ],
)
def test_bad_configs_are_refused_by_name(change, error, message, tmp_path):
    config = tiny_config()
    with config.unlocked():
        for key, value in change.items():
            config.update_from_flattened_dict({key: value})
    with pytest.raises(error, match=message):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "config",
    [
        digits_plain110.get_config(),
        digits_plain110_sgd.get_config(),
        digits_depth.get_config("depth=110"),
        *(cifar10_plain.get_config(f"method={m}") for m in ("ortho", "isometric", "l2")),
        cifar10_plain.get_config("depth=110,preset=cpu"),
        *(cifar10_resnet.get_config(f"method={m}") for m in ("l2", "ortho")),
    ],
)
def test_every_config_builds(config):
    config.dataset = {"name": "digits"}  # the data sets have tests of their own
    assert build(config).net.depth in (44, 110)


@pytest.mark.parametrize(
    "config",
    [
        *(imagenet_plain.get_config(f"method={m}") for m in ("ortho", "isometric", "l2")),
        imagenet_plain.get_config("depth=101,preset=mini"),
        *(imagenet_resnet.get_config(f"depth=101,method={m}") for m in ("l2", "ortho")),
    ],
)
def test_every_imagenet_config_builds(config):
    config.mesh.data = 1
    experiment = build(config, records=False)
    assert experiment.net.depth in (34, 101)
    assert experiment.dataset.image_shape in ((224, 224, 3), (64, 64, 3))
    assert experiment.net.num_classes == 1000


@pytest.mark.parametrize("module", [cifar10_plain, cifar10_resnet, imagenet_plain])
def test_config_arguments_are_checked(module):
    with pytest.raises(ConfigError, match="dephh.*depth"):
        module.get_config("dephh=44")
    with pytest.raises(ConfigError, match="method"):
        module.get_config("method=adamant")


def test_help_is_quick_and_imports_stay_light():
    start = time.monotonic()
    subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), "--help"], capture_output=True, check=True
    )
    assert time.monotonic() - start < 10  # 1 to 2 seconds on an idle machine
    code = (
        "import sys, orthojax; "
        "print([m for m in ('tensorflow', 'tensorflow_datasets', 'orbax', 'grain', 'matplotlib', "
        "'flax') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert out.stdout.strip() == "[]"


def test_trains_on_real_cifar10(tmp_path):
    data_dir = os.environ.get("ORTHOJAX_DATA_DIR")
    if not data_dir:
        pytest.skip("ORTHOJAX_DATA_DIR names no TFDS data directory with a prepared cifar10")
    config = cifar10_plain.get_config("depth=8,method=isometric,preset=cpu")
    config.update({"steps": 60, "batch_size": 64, "eval_every": 60})
    config.dataset.data_dir = data_dir
    config.model.width = 8
    config.mesh.data = 1
    summary = train_and_evaluate(config, tmp_path / "run")
    assert summary["test_accuracy"] > 0.18  # chance is 0.1
    losses = [r["loss"] for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.optimizer.learnin_rate=0.1", "learnin_rate=0.1: .*`optimizer.learning_rate`"),
        ("--config.modl.depth=8", "modl.depth=8: .*`model`"),
        ("--config=configs/none.py", "configs/none.py"),
        (f"--config={ROOT}/configs/cifar10_plain.py:dept=44", "`dept`; did you mean `depth`"),
        ("--config.batch_size=ten", "batch_size=ten"),
        ("--wrkdir=runs", "wrkdir.*workdir"),
    ],
)
def test_bad_flags_are_refused_in_one_message(flag, message):
    process = subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), flag], capture_output=True, text=True
    )
    assert process.returncode == 2
    assert re.search(f"^error: .*{message}", process.stderr, re.DOTALL)
    assert "Traceback" not in process.stderr


def test_seeds_rates_and_coefficients_share_a_program():
    first, other = tiny_config(), tiny_config()
    other.seed, other.model.kernel_init, other.model.bn_bias = 7, "he", 0.5
    other.optimizer.learning_rate, other.regularizer.coefficient = 0.3, 0.02
    texts = [lower_train_step(build(config)).as_text() for config in (first, other)]
    assert texts[0] == texts[1]
    other.regularizer = {"name": "l2", "coefficient": 0.02}
    assert lower_train_step(build(other)).as_text() != texts[0]


@pytest.mark.parametrize("key", ["seed", "optimizer.learning_rate", "regularizer.coefficient"])
def test_numbers_given_to_the_program_count(key):
    losses = []
    for value in (1, 2):
        config = tiny_config()
        config.model.kernel_init = "he"  # which the regularizer finds something to do with
        config.update_from_flattened_dict({key: value if key == "seed" else float(value)})
        experiment = build(config)
        programs = compile_steps(experiment)
        state = programs.init()
        batches = experiment.dataset.train_batches(experiment.settings.batch_size, 0)
        for _ in range(2):
            state, metrics = programs.train_step(state, programs.put(next(batches)))
        losses.append(float(metrics["param_norm"]))
    assert losses[0] != losses[1]
