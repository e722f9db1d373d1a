"""Programs of `launch/` run in this process: one that is started anew imports JAX for seconds."""

import contextlib
import functools
import io
import os
import pathlib
import runpy
import sys
import types
import typing
from unittest import mock

import pytest
from absl import flags as absl_flags

from orthojax.commands import command_line, config_flag

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
sys.path.insert(0, str(LAUNCH))  # as for the programs themselves


class Ended(typing.NamedTuple):
    """How a program ended, and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def program():
    """Runs a program as `python launch/NAME.py ARGUMENTS` does, with no setting of the process."""

    def run(name, *arguments, cwd=".", **environment):
        path, defined = str(LAUNCH / f"{name}.py"), absl_flags.FLAGS
        out, err = io.StringIO(), io.StringIO()
        code = 0
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            contextlib.chdir(cwd),
            mock.patch.dict(os.environ, environment),
            mock.patch("sys.argv", [path, *map(str, arguments)]),
            mock.patch.object(command_line, "leave_on_signals"),
            mock.patch("platform.libc_ver", return_value=("", "")),  # else its allocator is set
        ):
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as end:
                code = end.code or 0
            finally:
                defined.unparse_flags()
                for flag in list(defined):  # those of libraries stay
                    if defined.find_module_defining_flag(flag).startswith(("orthojax.", path)):
                        delattr(defined, flag)
        return Ended(code, out.getvalue(), err.getvalue())

    return run


@pytest.fixture
def flags(monkeypatch, tmp_path):
    """Loads a config as a program in `tmp_path` would, with these words on its command line."""
    monkeypatch.chdir(tmp_path)

    def load(*words):
        monkeypatch.setattr(config_flag, "_overrides", {})
        values = absl_flags.FlagValues()
        own = types.SimpleNamespace(FLAGS=values, Error=absl_flags.Error)
        own.DEFINE_string = functools.partial(absl_flags.DEFINE_string, flag_values=values)
        monkeypatch.setattr(config_flag, "flags", own)
        config_flag.define_config()
        values(config_flag.without_overrides(["train.py", *words]))
        return config_flag.load_config()

    return load
