"""Bad inputs by the hundred: each is refused in words, or comes to the same end.

None may end in a traceback, and none in silence: a bad option exits with 2 and a message that names
it; a damaged file is named, set aside or written anew, and the run has the result it had. The
normal tests take a sample; all of them: `pytest -m slow tests/launch/test_bad_inputs.py`.
"""

import itertools
import os
import pathlib
import random
import shutil

import jax
import pytest

from orthojax.commands import command_line
from orthojax.commands.overrides import Override, apply
from orthojax.configs import digits_plain110
from orthojax.training import train
from orthojax.training.compiled import abstract_state, compile_steps
from orthojax.training.experiment import build

ROOT = pathlib.Path(__file__).parents[2]

NO_NUMBER = ("ten", "None", "True", "''", "(1,)", "{'a': 1}", "nan", "inf", "-inf", "1e999", "0x")
NO_COUNT = (*NO_NUMBER, "0", "-1", "-99999999999999999999", "1.5", "1e3")
NO_NAME = ("nonsense", "3", "None", "''", "('a',)", "ÿ\x00", "a b", "../..")
NO_TRUTH = ("maybe", "2", "None", "0.5", "(True,)")
NO_PARTS = ("(0.8,0.5)", "(0.5,0.5)", "(-0.1,)", "(1.1,)", "(nan,)", "('a',)", "x", "None")
BAD_VALUES = {
    **dict.fromkeys(("steps", "log_every", "eval_every", "checkpoint_every"), NO_COUNT),
    **dict.fromkeys(("keep_checkpoints", "model.width"), NO_COUNT),
    "batch_size": (*NO_COUNT, "1438", "1000000000"),
    "observe_every": tuple(value for value in NO_COUNT if value != "0"),
    "seed": (*(value for value in NO_COUNT if value != "0"), "4294967296"),
    "model.depth": (*NO_COUNT, "9", "2"),
    "model.bn_groups": (*NO_COUNT, "3", "1000"),
    "dataset.downsample": (*NO_COUNT, "3", "16"),
    "mesh.data": ("0", "-2", "64", "1.5", "None", "all"),
    "mesh.fsdp": ("0", "-1", "64", "1.5", "None"),
    "optimizer.learning_rate": (*NO_NUMBER, "-0.1", "-1e-30"),
    "optimizer.momentum": (*(v for v in NO_NUMBER if v != "None"), "-0.1", "1", "1.5"),
    "regularizer.coefficient": (*NO_NUMBER, "-1"),
    "schedule.factor": (*NO_NUMBER, "0", "-0.5"),
    "schedule.warmup_steps": ("-1", "41", "1e9", "1.5", "nan", "None", "few"),
    "schedule.boundaries": NO_PARTS,
    "model.bn_bias": (*NO_NUMBER, "1e30", "-101"),
    "dtype": (*NO_NAME, "float64", "int32", "bool", "complex64"),
    **dict.fromkeys(("model.name", "model.kernel_init", "model.remat", "dataset.name"), NO_NAME),
    **dict.fromkeys(("optimizer.name", "schedule.name", "regularizer.name"), NO_NAME),
    "regularizer.grouping": NO_NAME,
    "regularizer.mask": ("a", "3", "('a',)", "{'kernel': 1}"),
    "regularizer.view": ("a", "3"),
    "dataset.train_split": ("nonsense", "''", "train[:0]", "train[", "train[50%:50%]", "None", "3"),
    "dataset.test_split": ("nonsense", "test[:0]", "None"),
    "dataset.data_dir": ("/dev/null", "/dev/null/below", "gs://bucket/a", "s3://bucket"),
    **dict.fromkeys(("dataset.flip", "model.scan", "tensorboard"), NO_TRUTH),
    "optimizer.nesterov": NO_TRUTH,
    "optimizer.accumulator_dtype": ("nonsense", "int8", "3"),
    "modulation": ("3", "yes", "(1,)", "{'nonsense': 1}"),
    "model": ("None", "3", "{}", "{'name': 'PlainNet', 'nonsense': 1}"),
    "optimizer": ("None", "3", "{}", "{'name': 'sgd'}"),
    # Keys that do not exist.
    **dict.fromkeys(
        ("nonsense", "nonsense.nonsense", "model.nonsense", "model.modulation"), ("1",)
    ),
    **dict.fromkeys(("schedule.base", "schedule.steps", "dataset.crop", "mesh.devices"), ("3",)),
    **dict.fromkeys(("optimizer.b1", "learning_rate"), ("0.9",)),
    **dict.fromkeys(("model.width.x", "", ".", ".."), ("1",)),
    "model.dtype": ("float32",),
}
GOOD = ("log_every=3", "model.kernel_init=he", "tensorboard=False", "mesh.data=1", "dtype=bfloat16")


def bad_options():
    """(key, words of the command line): one that is bad, among up to three that are good."""
    draw = random.Random(0)
    for key, values in BAD_VALUES.items():
        for value in values:
            section = key.split(".")[0]
            others = [good for good in GOOD if not section or not good.startswith(section)]
            words = draw.sample(others, draw.randrange(4))
            words.insert(draw.randrange(len(words) + 1), f"{key}={value}")
            yield key, words


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("data"))


def tiny(data_dir):
    config = digits_plain110.get_config("depth=8,steps=6")
    config.update({"batch_size": 8, "log_every": 2, "eval_every": 3, "checkpoint_every": 2})
    config.model.width, config.mesh.data, config.dataset.data_dir = 2, 1, data_dir
    return config


def refusal(config, words, capsys):
    """Exit status and what is told of a command line; the program up to compilation."""

    def main():
        apply(config, [Override(*word.split("=", 1), f"--config.{word}") for word in words])
        abstract_state(build(config))

    capsys.readouterr()
    status = command_line.exit_status(main)
    return status, capsys.readouterr().err.strip()


def check_options(cases, data_dir, capsys):
    count, faults = 0, []
    for key, words in cases:
        count += 1
        [bad] = [word for word in words if word.startswith(f"{key}=")]
        try:
            status, told = refusal(tiny(data_dir), words, capsys)
        except Exception as error:
            faults.append(f"{words} ends in {type(error).__name__}: {error}")
            continue
        if status != 2:
            faults.append(f"{words} is taken in silence")
        # By its name, or by its value where that is a name: of a data set.
        elif not any(
            name in told for name in (key.rpartition(".")[2] or bad, bad.split("=", 1)[1])
        ):
            faults.append(f"{words} is not named: {told}")
        elif any(f"--config.{word}: " in told for word in words if word != bad):
            faults.append(f"{words}: another is blamed: {told}")
        elif "error: " not in told or told.count("\n") > 9:
            faults.append(f"{words} is told at length: {told}")
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults)
    return count


# The workdir of a finished run, and what may happen to its files.

DAMAGES = {
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "one bit": lambda file: _flip(file),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "null": lambda file: file.write_text("null\n"),
    "list": lambda file: file.write_text("[1]\n"),
    "no text": lambda file: file.write_bytes(b"\xff\xfe\x00garbage\n" * 3),
    "missing": lambda file: file.unlink(),
    "directory": lambda file: (file.unlink(), file.mkdir()),
}
FILES = (
    *("config.json", "environment.json", "metrics.jsonl", "summary.json", "lock", "curves.png"),
    *("preprocessing.json", "checksums.json"),
    *("checkpoints/6/checksums.json", "checkpoints/6/position/metadata"),
    *("checkpoints/6/state/_METADATA", "checkpoints/6/_CHECKPOINT_METADATA"),
    *("checkpoints/4/checksums.json", "checkpoints/4/state/manifest.ocdbt"),
)
OTHERS = {
    "checkpoints deleted": lambda run: shutil.rmtree(run / "checkpoints"),
    "checkpoints a file": lambda run: (
        shutil.rmtree(run / "checkpoints"),
        (run / "checkpoints").touch(),
    ),
    "a checkpoint deleted": lambda run: shutil.rmtree(run / "checkpoints/6"),
    "a checkpoint emptied": lambda run: (
        shutil.rmtree(run / "checkpoints/6"),
        (run / "checkpoints/6").mkdir(),
    ),
    "its state deleted": lambda run: shutil.rmtree(run / "checkpoints/6/state"),
    "all damaged": lambda run: [
        DAMAGES["cut"](f) for f in run.glob("checkpoints/*/checksums.json")
    ],
    "a file of a step's name": lambda run: (run / "checkpoints/9").touch(),
    "an empty step": lambda run: (run / "checkpoints/9").mkdir(),
    "a step that was begun": lambda run: (run / "checkpoints/9.orbax-checkpoint-tmp").mkdir(),
    "a stranger": lambda run: (run / "checkpoints/notes.txt").write_text("mine"),
    "a copy": lambda run: shutil.copytree(run / "checkpoints/6", run / "checkpoints/6 (copy)"),
    "no write before": lambda run: (run / ".0123456789abcdef.tmp").write_text("{"),
    "a link out": lambda run: (run / "tensorboard").symlink_to("/"),
    "a pipe": lambda run: os.mkfifo(run / "notes"),
}


def _flip(file):
    content = bytearray(file.read_bytes())
    if content:
        content[len(content) // 2] ^= 1
    file.write_bytes(content)


def damages():
    for name, (how, damage) in itertools.product(FILES, DAMAGES.items()):
        yield f"{name} {how}", lambda run, n=name, d=damage: d(run / n)
    yield from OTHERS.items()


@pytest.fixture(scope="session")
def finished(data_dir, tmp_path_factory):
    """A finished run; the programs of its config, which are compiled once for all."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    programs = compile_steps(build(tiny(data_dir)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "compile_steps", lambda experiment: programs)
        summary = train.train_and_evaluate(tiny(data_dir), workdir)
    return workdir, programs, summary


def check_damage(cases, finished, data_dir, place, capsys, monkeypatch):
    workdir, programs, summary = finished
    monkeypatch.setattr(train, "compile_steps", lambda experiment: programs)
    count, faults = 0, []
    for (name, damage), unfinished in cases:
        count += 1
        run = shutil.copytree(workdir, place / f"{count}")
        damage(run)
        if unfinished and (run / "summary.json").is_file():
            (run / "summary.json").unlink()
        capsys.readouterr()
        for _ in range(2):  # the same command again, to the same end
            try:
                fault = damage_fault(run, data_dir, summary, capsys)
            except BaseException as error:
                fault = f"ends in {type(error).__name__}: {error}"
            if fault:
                faults.append(f"{name}, {'unfinished' if unfinished else 'finished'}: {fault}")
        shutil.rmtree(run)
    assert not faults, f"{len(faults)} of {count}:\n" + "\n".join(faults)
    return count


def damage_fault(run, data_dir, summary, capsys):
    """What is wrong with how a damaged run is taken, or None."""
    results = []
    status = command_line.exit_status(
        lambda: results.append(train.train_and_evaluate(tiny(data_dir), run))
    )
    told = capsys.readouterr().err
    if status == 2:
        error = told[told.find("error: ") :]
        short = error.startswith("error: ") and error.count("\n") <= 6 and str(run) in error
        return None if short else f"is told like this: {told}"
    same = [results[0][key] == summary[key] for key in ("test_accuracy", "test_loss", "steps")]
    return None if status == 0 and all(same) else f"comes to another end: {status}, {results}"


pytestmark = pytest.mark.filterwarnings("ignore:the checkpoint of step")


def sampled(one_in):
    """One case in so many; every one in `pytest -m slow`."""
    return pytest.mark.parametrize("step", [one_in, pytest.param(1, marks=pytest.mark.slow)])


@sampled(17)
def test_bad_options_are_refused_by_name(step, data_dir, capsys):
    cases = list(bad_options())[::step]
    assert check_options(cases, data_dir, capsys) >= 400 // step


@sampled(39)
def test_damage_comes_to_the_same_end(step, finished, data_dir, tmp_path, capsys, monkeypatch):
    cases = list(itertools.product(damages(), (False, True)))[step // 2 :: step]
    assert check_damage(cases, finished, data_dir, tmp_path, capsys, monkeypatch) >= 240 // step


def test_the_good_options_are_good(data_dir, capsys):
    """Else a refusal of a bad one among them would show nothing."""
    config = tiny(data_dir)
    assert refusal(config, GOOD, capsys) == (0, "")
    assert config.dtype == "bfloat16" and jax.devices()
