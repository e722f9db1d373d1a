"""Training end to end: on a tiny net, in this process and in ones that are killed."""

import dataclasses
import errno
import json
import logging.handlers
import os
import pathlib
import runpy
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

import orthojax
from orthojax.commands.command_line import exit_status, keep_compiled_programs
from orthojax.config.sections import to_json
from orthojax.configs import (
    cifar10_plain,
    cifar10_resnet,
    digits_depth,
    digits_modulated,
    digits_plain110,
    imagenet_plain,
    imagenet_resnet,
)
from orthojax.configs._methods import METHODS, RESIDUAL_METHODS
from orthojax.errors import ConfigError, DatasetError, DivergenceError, WorkdirError
from orthojax.sites.modulation import find_state
from orthojax.storage.checkpoint import Checkpointer
from orthojax.storage.checksums import write_checksums
from orthojax.storage.metrics import MetricWriter, read_metrics
from orthojax.storage.saved import POSITION, saved_steps
from orthojax.storage.workdir import claim, seal, write_json_atomic
from orthojax.training import train
from orthojax.training.compiled import abstract_state, lower_train_step
from orthojax.training.experiment import build
from orthojax.training.loop import evaluate
from orthojax.training.train import train_and_evaluate
from tests.training.tiny import programs_shared, tiny_config

ROOT = pathlib.Path(__file__).parents[2]


STEPS = 20


def config_of(steps=STEPS, **changes):
    intervals = {"log_every": 2, "eval_every": 10, "checkpoint_every": 4}
    return tiny_config(steps, **{**intervals, **changes})


@pytest.fixture(scope="module", autouse=True)
def shared():
    yield from programs_shared()


@pytest.fixture(scope="module")
def logged_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    logged = logging.handlers.BufferingHandler(10**6)
    logging.getLogger("jax").addHandler(logged)
    with jax.log_compiles():
        summary = train_and_evaluate(config_of(), workdir)
    logging.getLogger("jax").removeHandler(logged)
    return workdir, summary, [record.getMessage() for record in logged.buffer]


@pytest.fixture(scope="module")
def finished(logged_run):
    return logged_run[:2]


@pytest.fixture(scope="module")
def programs():
    return train.compile_steps(build(config_of()))


def final_state(workdir):
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        return checkpointer.restore_latest(abstract_state(build(config_of()))).state


def newest(workdir):
    """The step of the newest checkpoint."""
    return max(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(scope="module")
def undisturbed(finished):
    return final_state(finished[0])


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
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(2, 21, 2))
    assert [r["step"] for r in records if r["kind"] == "test"] == [10, 20]
    assert summary["chosen_by"] is None and not [name for name in summary if "best" in name]
    steps = {int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()}
    assert steps == {12, 16, 20}


def test_no_step_is_compiled_twice(logged_run, programs):
    compiled = [line for line in logged_run[2] if line.startswith("Finished XLA compilation")]
    for step in ("train_step", "eval_step"):
        assert sum(step in name for name in compiled) == 1, compiled
    # The compiled program takes no other shapes: a second compilation cannot hide.
    batch = {"image": np.zeros((31, 8, 8, 1), np.uint8), "label": np.zeros(31, np.int32)}
    with pytest.raises(TypeError):
        programs.train_step(programs.init(), batch)


def test_a_resumed_run_says_that_its_convolutions_are_others(tmp_path, capsys, monkeypatch):
    compile_steps = train.compile_steps
    told = []
    for steps, convolution in ((4, "native 0a1b"), (6, "native 0a1b"), (8, None), (8, "XLA")):
        if convolution is None:  # a start that ended before it was compiled
            claim(tmp_path / "run", config_of(steps))
            continue
        monkeypatch.setattr(
            train,
            "compile_steps",
            lambda experiment, name=convolution: dataclasses.replace(
                compile_steps(experiment), convolution=name
            ),
        )
        train_and_evaluate(config_of(steps), tmp_path / "run")
        told.append("convolution: 'native 0a1b' -> 'XLA'" in "".join(capsys.readouterr()))
    assert told == [False, False, True]
    starts = json.loads((tmp_path / "run" / "environment.json").read_text())
    found = [start.get("convolution") for start in starts]
    assert found == ["native 0a1b", "native 0a1b", None, "XLA"]


def test_every_step_measures_at_every_site(undisturbed):
    state = find_state(undisturbed.opt_state)
    assert state.count == state.measured == STEPS
    assert all((moments > 0).all() for moments in jax.tree.leaves(state.moments))


def test_evaluation_is_exact(finished, undisturbed, programs):
    """Against one batch of the whole split, which needs no padding."""
    experiment = build(config_of())
    split = experiment.dataset.test
    assert len(split) % experiment.settings.batch_size  # so that there is padding
    variables = {"params": undisturbed.params, "batch_stats": undisturbed.batch_stats}
    images = (split.images / 255 - experiment.dataset.mean) / experiment.dataset.std
    evaluated = jax.jit(lambda images: experiment.net.apply(variables, images, train=False))
    logits = np.asarray(evaluated(images.astype(np.float32)), np.float64)
    accuracy = np.mean(np.argmax(logits, -1) == split.labels)
    order = np.argsort(-logits, axis=-1)[:, :5]
    top5_accuracy = np.mean((order == split.labels[:, None]).any(-1))
    logsumexp = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    loss = np.mean(logsumexp - logits[np.arange(len(split)), split.labels])
    test = evaluate(experiment, programs, undisturbed)
    assert test["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert test["top5_accuracy"] == pytest.approx(top5_accuracy, abs=1e-9)
    assert accuracy < top5_accuracy < 1
    assert test["loss"] == pytest.approx(loss, rel=1e-4)
    assert finished[1]["test_accuracy"] == test["accuracy"]


def test_first_layer_filters_of_a_run_are_drawn(finished, tmp_path, capsys):
    workdir, _ = finished
    main = runpy.run_path(str(ROOT / "launch" / "draw_filters.py"))["main"]
    assert main([str(tmp_path / "filters.png"), f"ours={workdir}"]) == 0
    assert (tmp_path / "filters.png").read_bytes().startswith(b"\x89PNG")
    assert main([str(tmp_path / "none.png"), f"ours={tmp_path}"]) == 2
    assert "holds no run" in capsys.readouterr().err


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
    assert train_and_evaluate(config_of(log_every=5), workdir) == finished[1]
    told = capsys.readouterr().err
    assert "has finished its 20 steps" in told and ("gone" in told) == (checkpoints == "deleted")
    config = [workdir / "config.json", workdir / "checksums.json"]  # of log_every
    assert files_of(workdir) == before | {path: path.read_bytes() for path in config}


def test_more_steps_and_other_intervals_are_the_same_run_and_longer(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    longer = config_of(24, log_every=1, eval_every=2, checkpoint_every=2, keep_checkpoints=1)
    summary = train_and_evaluate(longer, workdir)
    assert summary["resumed_from_step"] == 20 and summary["steps"] == 24
    assert "steps=20 before, 24 now" in capsys.readouterr().err
    assert json.loads((workdir / "summary-20.json").read_text()) == finished[1]
    records = read_metrics(workdir)
    assert records[: len(read_metrics(finished[0]))] == read_metrics(finished[0])
    assert [r["step"] for r in records if r["kind"] == "train"][-4:] == [21, 22, 23, 24]
    assert json.loads((workdir / "config.json").read_text())["steps"] == 24
    with pytest.raises(WorkdirError, match="of step 24, and steps=10 is less"):
        train_and_evaluate(config_of(10), workdir)


def test_a_run_that_kept_the_best_by_test_accuracy_is_read_and_goes_on(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    for checkpoint in (workdir / "checkpoints").iterdir():
        position = json.loads((checkpoint / POSITION).read_text())
        del position["best"]
        (checkpoint / POSITION).write_text(json.dumps(position))
        (checkpoint / "metrics").mkdir()
        (checkpoint / "metrics" / "metrics").write_text('{"test_accuracy": 0.9}')
        write_checksums(checkpoint, ["state", "position", "metrics"])
    (workdir / "checkpoints" / "12").rename(workdir / "checkpoints" / "2")  # kept as the best
    summary = {key: value for key, value in finished[1].items() if key != "chosen_by"}
    summary |= {"best_test_accuracy": 0.9, "best_step": 2}
    write_json_atomic(workdir / "summary.json", summary)
    seal(workdir, "summary.json")
    assert orthojax.load_classifier(workdir).step == 20
    assert train_and_evaluate(config_of(), workdir) == summary
    assert train_and_evaluate(config_of(24), workdir)["resumed_from_step"] == 20
    assert saved_steps(workdir / "checkpoints") == [16, 20, 24]


def test_without_its_checkpoints_a_run_begins_anew_and_keeps_the_record(finished, tmp_path, capsys):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "summary.json").unlink()
    before = (workdir / "metrics.jsonl").read_bytes()
    summary = train_and_evaluate(config_of(), workdir)
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
        train_and_evaluate(config_of(), workdir)
    assert len(str(error.value).splitlines()) <= 3
    monkeypatch.setattr(MetricWriter, "write", write)
    assert train_and_evaluate(config_of(), workdir)["resumed_from_step"] == 8


def test_what_was_compiled_is_kept_for_the_next_start(tmp_path, monkeypatch):
    """And no program twice, for another seed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    config = config_of()
    config.model = {"name": "tests.training.test_own_net:Linear"}
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    try:
        keep_compiled_programs()
        jax.config.update(names[1], 0.0)
        compilation_cache.reset_cache()
        for config.seed in (0, 1):
            lowered(config).compile()
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    kept = [path.name for path in (tmp_path / "orthojax" / "xla").iterdir()]
    assert sum("train_step" in name and name.endswith("-cache") for name in kept) == 1, kept


def launch(workdir, *overrides, until, send):
    """Runs launch/train.py; when a progress line contains `until`, sends the signal `send`."""
    process = subprocess.Popen(
        [
            *(sys.executable, str(ROOT / "launch" / "train.py"), f"--workdir={workdir}"),
            f"--config={ROOT / 'configs' / 'digits_plain110.py'}:depth=8,steps={STEPS}",
            *("--config.model.width=4", "--config.batch_size=32", "--config.mesh.data=1"),
            *("--config.schedule.warmup_steps=2", "--config.schedule.boundaries=()"),
            *("--config.log_every=2", "--config.eval_every=10", "--config.checkpoint_every=4"),
            *overrides,
        ],
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


def test_killed_and_resumed_equals_undisturbed_bit_for_bit(finished, undisturbed, tmp_path, capsys):
    # By step 10 the save of step 8 has begun, so that of step 4 has finished.
    code, output = launch(tmp_path / "run", until="step 10/20", send=signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    assert train_and_evaluate(config_of(), tmp_path / "run")["resumed_from_step"] >= 4
    assert "resuming" in capsys.readouterr().err
    assert_bitwise_equal(final_state(tmp_path / "run"), undisturbed)
    assert read_metrics(tmp_path / "run") == read_metrics(finished[0])


def test_signals_save_before_leaving(undisturbed, tmp_path, capsys):
    every = "--config.log_every=1"  # more moments at which a line is seen
    code, output = launch(tmp_path / "run", every, until="step 2/20", send=signal.SIGTERM)
    assert code == 128 + signal.SIGTERM, output
    assert f"saved at step {newest(tmp_path / 'run')} of 20; run the same command again" in output
    config = config_of(log_every=1)
    for number in (signal.SIGHUP, signal.SIGINT):
        left = [number]  # a second signal would act as it always does

        def send(step, record, left=left):
            while left:
                os.kill(os.getpid(), left.pop())

        code = exit_status(lambda send=send: train_and_evaluate(config, tmp_path / "run", [send]))
        assert code == 128 + number
        told = f"saved at step {newest(tmp_path / 'run')} of 20; run the same command again"
        assert told in capsys.readouterr().err
    assert 4 <= train_and_evaluate(config, tmp_path / "run")["resumed_from_step"] < 20
    assert_bitwise_equal(final_state(tmp_path / "run"), undisturbed)


def test_divergence_stops_with_a_message_and_keeps_the_last_good_checkpoint(finished, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    config = config_of(log_every=1)
    config.optimizer.learning_rate = 1e30
    (workdir / "summary.json").unlink()
    write_json_atomic(workdir / "config.json", to_json(config))
    shutil.rmtree(workdir / "checkpoints" / "20")
    with pytest.raises(
        DivergenceError, match=r"diverged at step \d+: .*step 16 is kept.*learning_rate"
    ):
        train_and_evaluate(config, workdir)
    assert newest(workdir) == 16


def test_damaged_newest_checkpoint_falls_back_to_the_one_before(finished, undisturbed, tmp_path):
    workdir = shutil.copytree(finished[0], tmp_path / "run")
    newest = workdir / "checkpoints" / "20"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="step 20 is unreadable.*from step 16"):
        summary = train_and_evaluate(config_of(), workdir)
    assert summary["resumed_from_step"] == 16
    assert_bitwise_equal(final_state(workdir), undisturbed)


def test_workdir_of_another_config_is_refused_and_untouched(finished):
    workdir, _ = finished
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    with pytest.raises(WorkdirError, match=r"optimizer.learning_rate: 0.005 -> 0.5"):
        config = config_of()
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
        ({"modulation.decay": 2.0}, ConfigError, r"`modulation`: decay=2.0 must be .* \[0, 1\)"),
        ({"regularizer.name": "orto"}, ConfigError, "did you mean `ortho`.*ortho, l2, none"),
        ({"dataset.name": "digit"}, DatasetError, "digits"),
        ({"batch_size": 2048}, DatasetError, "2048.*1437"),
        (
            {"dataset.validation": -0.1},
            ConfigError,
            "`dataset`: validation=-0.1 must be 0 for none",
        ),
        ({"dataset.validation": 1437}, ConfigError, "validation=1437 .* at most 1436"),
        ({"dataset.validation": 1e-5}, ConfigError, "validation=1e-05 must be"),
        ({"dataset.validation": 1.5}, ConfigError, "validation=1.5 must be"),
        ({"dataset.validation": True}, ConfigError, "`dataset.validation` is True"),
        ({"dataset.validation": float("nan")}, ConfigError, "`dataset.validation` is nan"),
        ({"dataset.validation": 1420}, ConfigError, "`dataset.validation` is 1420.* 17 training"),
        ({"patience": 2}, ConfigError, "`patience` is 2, .*`dataset.validation`"),
        ({"patience": 0, "dataset.validation": 0.1}, ConfigError, "`patience` is 0"),
        ({"dtype": "float33"}, ConfigError, "dtype.*float33"),
        ({"steps": 0}, ConfigError, "`steps` is 0"),
        ({"seed": -1}, ConfigError, "`seed` is -1"),
        ({"seed": 2**32}, ConfigError, "`seed` is 4294967296"),
        ({"keep_checkpoints": 0}, ConfigError, "`keep_checkpoints` is 0"),
        ({"dtype": "f2", "modulation": None}, ConfigError, "float16.*`loss_scale`.*bfloat16"),
        ({"dtype": "float64"}, ConfigError, "`dtype` is float64"),
        ({"dtype": "int32"}, ConfigError, "`dtype` is int32"),
        ({"model.width": 0}, ConfigError, "`model`: width=0 must be"),
        ({"model.bn_bias": 1e30}, ConfigError, "`model.bn_bias` is 1e.30"),
        ({"model.bn_bias": float("nan")}, ConfigError, "`model.bn_bias` is nan"),
        ({"optimizer.learning_rate": -0.1}, ConfigError, "`optimizer.learning_rate` is -0.1"),
        ({"optimizer.momentum": 1.5}, ConfigError, "`optimizer.momentum` is 1.5.*less than 1"),
        ({"regularizer.coefficient": -1.0}, ConfigError, "`regularizer.coefficient` is -1.0"),
        ({"schedule.warmup_steps": 31}, ConfigError, "`schedule.warmup_steps` is 31.*steps=20"),
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
    config = config_of()
    with config.unlocked():
        for key, value in change.items():
            config.update_from_flattened_dict({key: value})
    with pytest.raises(error, match=message):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "config",
    [
        *(digits_plain110.get_config(f"method={m}") for m in METHODS),
        digits_modulated.get_config(),
        digits_depth.get_config("depth=110"),
        *(cifar10_plain.get_config(f"method={m}") for m in METHODS),
        cifar10_plain.get_config("depth=110,preset=cpu"),
        *(cifar10_resnet.get_config(f"method={m}") for m in RESIDUAL_METHODS),
        *(imagenet_plain.get_config(f"method={m}") for m in METHODS),
        imagenet_plain.get_config("depth=101,preset=mini"),
        *(imagenet_resnet.get_config(f"depth=101,method={m}") for m in RESIDUAL_METHODS),
    ],
)
def test_every_config_builds(config):
    config.mesh.data = 1
    experiment = build(config, records=False)
    large = config.dataset.name.startswith("imagenet")
    assert experiment.net.depth in ((34, 101) if large else (44, 110))
    assert experiment.net.num_classes == (1000 if large else 10)
    assert experiment.dataset.image_shape[0] in ((64, 224) if large else (8, 16, 32))


@pytest.mark.parametrize("module", [cifar10_plain, cifar10_resnet, imagenet_plain])
def test_config_arguments_are_checked(module):
    with pytest.raises(ConfigError, match="dephh.*depth"):
        module.get_config("dephh=44")
    with pytest.raises(ConfigError, match="method"):
        module.get_config("method=adamant")


def test_imports_stay_light():
    heavy = {"tensorflow", "tensorflow_datasets", "orbax", "grain", "matplotlib", "tensorboardX"}
    code = f"""
import sys, orthojax
from jax._src import xla_bridge
assert "flax" not in sys.modules and "scipy" not in sys.modules
assert not xla_bridge.backends_are_initialized()
import orthojax.config.sections, orthojax.storage.metrics, orthojax.training.progress
assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.slow
def test_trains_on_real_cifar10(tmp_path):
    data_dir = os.environ.get("ORTHOJAX_DATA_DIR")
    if not data_dir:
        pytest.skip("ORTHOJAX_DATA_DIR names no TFDS data directory with a prepared cifar10")
    config = cifar10_plain.get_config("depth=8,method=near_isometric,preset=cpu")
    config.update({"steps": 60, "batch_size": 64, "eval_every": 60})
    config.dataset.data_dir = data_dir
    config.model.width = 8
    config.mesh.data = 1
    summary = train_and_evaluate(config, tmp_path / "run")
    assert summary["test_accuracy"] > 0.18  # chance is 0.1
    losses = [r["loss"] for r in read_metrics(tmp_path / "run") if r["kind"] == "train"]
    assert losses[-1] < losses[0]


def lowered(config):
    experiment = build(config)
    return lower_train_step(experiment, abstract_state(experiment))


def test_seeds_rates_and_coefficients_share_a_program():
    first, other = config_of(), config_of()
    other.seed, other.model.kernel_init, other.model.bn_bias = 7, "he", 0.5
    other.optimizer.learning_rate, other.regularizer.coefficient = 0.3, 0.02
    texts = [lowered(config).as_text() for config in (first, other)]
    assert texts[0] == texts[1]
    other.regularizer = {"name": "l2", "coefficient": 0.02}
    assert lowered(other).as_text() != texts[0]


def test_numbers_given_to_the_program_count(programs):
    batches = build(config_of()).dataset.train_batches(32, 0)
    batch = programs.put(next(batches))

    def trained(key, value):
        config = config_of()
        config.update_from_flattened_dict({key: value})
        hyperparams = build(config).hyperparams
        state = programs.compiled_init(hyperparams.seed)
        # Away from orthonormal kernels, so that the regularizer finds something to do.
        state = state.replace(params=jax.tree.map(lambda p: 1.5 * p, state.params))
        _, metrics = programs.compiled_train_step(state, batch, hyperparams)
        return float(metrics["param_norm"])

    for key in ("seed", "optimizer.learning_rate", "regularizer.coefficient"):
        values = (1, 2) if key == "seed" else (1.0, 2.0)
        assert trained(key, values[0]) != trained(key, values[1])
