"""The command line of the programs that take `--config`: files, flags, help, signals."""

import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest

from orthojax.caches import cache_directory
from orthojax.commands import command_line, config_flag
from orthojax.data import prepared
from orthojax.errors import ConfigError, UserError
from orthojax.storage.paths import local_path, to_path

TRAIN = pathlib.Path(__file__).parents[2] / "launch" / "train.py"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_flags_the_configs_and_an_example(flag, program):
    code, out, _ = program("train", flag)
    assert code == 0
    for words in ("--config:", "--workdir:", "cifar10_plain:", "method: `near_isometric`"):
        assert words in out
    assert out.strip().splitlines()[-1].strip().startswith("python launch/train.py --config=")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--wrkdir=runs"], "wrkdir.*workdir"),
        (["--steps=10"], "'steps'.*by --config.steps=VALUE"),
        (["--learning_rate", "0.1"], "--config.optimizer.learning_rate=VALUE"),
        (["--model.depth=44"], "--config.model.depth=VALUE"),
        (["--dataset=cifar10"], "--config.dataset.name=VALUE"),
        (["runs/a"], "unexpected arguments: runs/a"),
        (["--", "--workdir=a"], "unexpected arguments: --workdir=a"),
        (["--timeout=soon"], "timeout=soon"),
        (["--process_id=-1"], "process_id"),
    ],
)
def test_usage_errors_exit_with_2(arguments, message, program):
    code, _, err = program("train", *arguments)
    assert code == 2 and err.startswith("error: ")
    assert all(part in err for part in message.split(".*"))


def test_overrides_in_every_way_of_writing(flags):
    words = [
        "--config.seed",
        "3",
        "-config.steps=40",
        "--config.tensorboard",
        "--noconfig.dataset.flip",
    ]
    config = flags(*words, "--config=configs/digits_plain110.py:depth=8")
    found = config.seed, config.steps, config.tensorboard, config.dataset.flip, config.model.depth
    assert found == (3, 40, True, False, 8)


def test_a_config_is_found_by_name_and_in_the_home(flags, tmp_path, monkeypatch):
    assert flags("--config=configs/cifar10_plain.py:depth=56").model.depth == 56
    assert flags("--config=cifar10_plain:depth=20").model.depth == 20
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.py").write_text(
        "from orthojax.configs import digits_plain110\nget_config = digits_plain110.get_config\n"
    )
    assert flags("--config=~/mine.py:depth=14").model.depth == 14
    assert flags("--config=mine.py").model.depth == 110


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config(): 1 +", "cannot be read: line 1: SyntaxError"),
        ("import no_such_module", "cannot be read: line 1: ModuleNotFoundError: No module named"),
        ("x = 1", "defines no function get_config"),
        ("def get_config():\n    return nothing", "line 2: NameError: name 'nothing'"),
        ("def get_config():\n    return {'steps': 3}", "returns a dict; it must be an ml_coll"),
    ],
)
def test_a_config_file_that_is_none(flags, tmp_path, content, message):
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(ConfigError) as error:
        flags("--config=mine.py")
    assert message in str(error.value) and "mine.py" in str(error.value)


@pytest.mark.parametrize("place", ["12:30", "a:depth=20", "C:"])
def test_a_path_may_have_a_colon(flags, tmp_path, place):
    (tmp_path / place).mkdir()
    (tmp_path / place / "mine.py").write_text(
        "from orthojax.configs import digits_plain110\nget_config = digits_plain110.get_config\n"
    )
    for path in (f"{place}/mine.py", f"{tmp_path}/{place}/mine.py"):
        assert flags(f"--config={path}:depth=14").model.depth == 14
        assert flags(f"--config={path}").model.depth == 110
        assert config_flag.run_name() == "mine"


@pytest.mark.parametrize(
    ("program_name", "arguments"),
    [
        ("export", ["--workdir=none", "none/net.stablehlo"]),
        ("draw_filters", ["none/a.png", "a=none"]),
        ("draw_filters", ["a.nothing", "a=none"]),
        ("compare_runs", ["file/a.png", "a=none"]),
        ("compile_for_tpu", ["--json=file/a.json"]),
        ("sweep_coefficient", ["--output=none/a.jsonl"]),
        ("sweep_coefficient", ["--output=a.jsonl", "--workdir=file"]),
        ("benchmark", ["step", "--output=file"]),
        ("compare_orthogonality", ["--output=file/here"]),
        ("reproduce", ["theory", "--workdir=file"]),
        ("prepare_data", ["digits", "--data_dir=file"]),
        ("train", ["--workdir=file/run", "--config.dataset.train_split=nonsense"]),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(
    program, tmp_path, program_name, arguments
):
    (tmp_path / "file").touch()
    code, out, err = program(program_name, *arguments, cwd=tmp_path)
    assert code == 2 and "error: " in err and "Traceback" not in err and not out
    assert any(f"{name}/" in err or f"{name}'" in err for name in ("none", "file", "a.nothing")), (
        err
    )
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOTDIR, errno.ENAMETOOLONG])
def test_what_the_storage_will_refuse_again_is_bad_input(number, capsys):
    def main(number=number):
        raise OSError(number, os.strerror(number), "/data")

    assert command_line.exit_status(main) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(OSError):  # a crash, which clusters start again
        command_line.exit_status(lambda: main(errno.ETIMEDOUT))


def test_a_mistyped_config_says_where_it_was_looked_for(flags, tmp_path):
    with pytest.raises(ConfigError) as error:
        flags("--config=configs/cifar10_plan.py:depth=44")
    for words in ("did you mean cifar10_plain?", f"{tmp_path}/configs"):
        assert words in str(error.value)
    with pytest.raises(ConfigError, match="mine.py takes no arguments after a colon"):
        (tmp_path / "mine.py").write_text("def get_config(): pass")
        flags("--config=mine.py:depth=44")


def test_names_of_runs_are_fit_for_paths(flags):
    flags("--config=configs/cifar10_plain.py:depth=44, method=baseline")
    assert config_flag.run_name() == "cifar10_plain-depth=44-method=baseline"
    words = ["--config.seed=2", "--config.mesh.data=1", "--config.steps=9", "--config.log_every=1"]
    flags("--config=digits_plain110", *words, "--config.model.width=4", "--config.seed", "3")
    assert config_flag.run_name() == "digits_plain110-model.width=4-seed=3"
    flags("--config=digits_plain110", "--config.model.name=ResNet", "--config.mesh={'data': 1}")
    assert config_flag.run_name() == "digits_plain110-model.name=ResNet"


def test_names_of_runs_with_long_overrides_are_fit_too(flags):
    names = set()
    for split in ("ä" * 200, "ä" * 201):
        flags("--config=digits_plain110", f"--config.dataset.train_split={split}")
        names.add(config_flag.run_name())
    assert len(names) == 2 and all(len(os.fsencode(name)) <= 200 for name in names)


def test_commands_that_differ_in_an_override_do_not_share_a_directory(program):
    workdirs = []
    for words in ([], ["--config.seed=1"], ["--config.model.name=ResNet"], ["--config.steps=600"]):
        with mock.patch("orthojax.training.train.train_and_evaluate", return_value={}) as train:
            assert program("train", *words).code == 0
        workdirs.append(train.call_args.args[1])
    assert len(set(workdirs)) == 3 and workdirs[0] == workdirs[3] == "runs/digits_plain110"


@pytest.mark.parametrize("cache", ["", "relative", "~/c", None])
def test_the_compilation_cache_is_never_in_the_current_directory(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if cache is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", cache)
    place = tmp_path / ("c" if cache == "~/c" else ".cache") / "orthojax" / "xla"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    with mock.patch("jax.config.update") as update:
        command_line.keep_compiled_programs()
    update.assert_called_once_with("jax_compilation_cache_dir", str(place))


def test_no_compiled_program_of_somebody_else_is_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    place = tmp_path / "orthojax" / "xla"
    place.mkdir(parents=True)
    owner = 12345
    if os.getuid() == 0:
        os.chown(place, owner, -1)
    else:  # somebody else looks
        owner = os.getuid()
        monkeypatch.setattr("os.getuid", lambda: 12345)
    with mock.patch("jax.config.update") as update:
        command_line.keep_compiled_programs()
    assert not update.called
    told = capsys.readouterr().err
    assert f"not kept: {place} belongs to user {owner}" in told and len(told.splitlines()) == 1


def test_without_a_home_nothing_is_called_a_tilde(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    assert cache_directory("xla") is None
    for place in (to_path, local_path):
        with pytest.raises(UserError, match="~/runs: there is no home directory ~; set HOME"):
            place("~/runs")
    with pytest.raises(UserError, match="~/tensorflow_datasets: there is no home"):
        prepared.named_builder("digits", None)

    assert not list(tmp_path.iterdir())


def test_no_path_of_a_tilde_is_taken_literally(tmp_path, program):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir(), here.mkdir()
    tiny = ["--config=configs/digits_plain110.py:depth=8,steps=6", "--config.model.width=2"]
    tiny += ["--config.batch_size=8", "--config.mesh.data=1"]
    paths = ["--workdir=~/run", "--config.dataset.data_dir=~/data"]
    paths += ["--config.dataset.cache_dir=~/cache"]
    code, _, err = program("train", *tiny, *paths, cwd=here, HOME=str(home))
    assert code == 0, err
    assert {"run", "data", "cache"} <= {path.name for path in home.iterdir()}
    assert not list(here.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_compiling_ends_at_once_in_a_line(tmp_path, number):
    options = ["--config=configs/digits_plain110.py:depth=56", f"--workdir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, TRAIN, *options, "--config.model.scan=False"],  # compiles for minutes
        stderr=subprocess.PIPE,
        text=True,
    )
    while "compiling" not in (line := process.stderr.readline()):
        assert line, "it ended before compiling"
    time.sleep(1)
    sent = time.monotonic()
    process.send_signal(number)
    rest = process.stderr.read()
    assert process.wait() == 128 + number
    assert time.monotonic() - sent < 5
    assert rest.split() and len(rest.strip().splitlines()) == 1
    assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == 0
