"""What the programs that take `--config` have in common: the flag, its errors, the exit status."""

import contextlib
import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent


def run(define_flags, main):
    """Parses the command line and exits with what `main()` returns, or with what went wrong.

    0 is done; 2 bad input, which starting again will not mend; 128 + n stopped by signal n with
    everything saved, and the same command goes on; 1 anything else.
    """
    sys.path.insert(0, str(ROOT))  # so that configs may import each other
    keep_compiled_programs()  # before a config imports JAX, which reads its environment then
    with _config_errors_in_one_line(sys.argv):
        define_flags()
    app.run(lambda argv: _main(argv, main), flags_parser=_parse)


def keep_compiled_programs():
    """Has JAX keep what it compiles for the next start, unless the environment says where."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "orthojax" / "xla"))


def define_config(default="digits_plain110"):
    """Defines `--config`, and `--config.key` for every key of it."""
    # Here already absl looks for the overrides on the command line, so here they may fail.
    config_flags.DEFINE_config_file(
        "config",
        str(ROOT / "configs" / f"{default}.py"),
        "Config file, with its arguments after a colon: FILE.py:depth=44,method=ortho.",
    )


def config_name() -> str:
    """The config's name with its arguments, such as `cifar10_plain:depth=110`."""
    path, _, arguments = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    name = pathlib.Path(path).stem
    return f"{name}:{arguments}" if arguments else name


def _parse(argv):
    with _config_errors_in_one_line(argv):
        try:
            remaining = flags.FLAGS(argv)
        except SystemExit:  # of absl's --help, which calls that a failure
            sys.exit(0)
        flags.FLAGS.config.to_dict()  # a config that could not be loaded fails at its first use
        return remaining


@contextlib.contextmanager
def _config_errors_in_one_line(argv):
    """Exits with what is wrong with the config or an override of it, without a traceback."""
    try:
        yield
    except (flags.Error, AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        message = str(error).replace("\\'", "").replace("\\n", ". ")
        if message.startswith("'"):  # the quotes that a KeyError puts around its text
            message = message.strip("'")
        if "Traceback" in message:  # of a config file, of which the last line says what is wrong
            message = message.splitlines()[-1].partition(": ")[2]
        for override in (word for word in argv if word.startswith("--config.")):
            keys = override.partition("=")[0].split(".")[1:]
            if override not in message and any(key in message for key in keys):
                message = f"{override}: unknown key {message}"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _main(argv, main):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)
    return exit_status(main)


def exit_status(main):
    """What `main()` returns, or what went wrong, told in a line; see `run` for the numbers."""
    # Late, so that --help and a mistyped flag answer at once.
    from orthojax.errors import UserError
    from orthojax.interrupt import Interrupted
    from orthojax.roll_call import ProcessesMissing

    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal_number
    except ProcessesMissing as missing:
        print(f"error: {missing}", file=sys.stderr)
        return 1
