"""Trains what a config describes, or goes on where the same command stopped.

python launch/train.py                                        # 110 plain layers on the digits
python launch/train.py --config=configs/cifar10_plain.py:preset=cpu --workdir=runs/cifar
python launch/train.py --config.optimizer.learning_rate=0.05  # any key of the config
"""

import contextlib
import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent


def define_flags():
    # Here already absl looks for the overrides on the command line, so here they may fail.
    config_flags.DEFINE_config_file(
        "config",
        str(ROOT / "configs" / "digits_plain110.py"),
        "Config file, with its arguments after a colon: FILE.py:depth=44,method=ortho.",
    )
    flags.DEFINE_string(
        "workdir", None, "Directory of this run's own; runs/<config name> by default."
    )


def parse_flags(argv):
    with config_errors_in_one_line(argv):
        remaining = flags.FLAGS(argv)
        flags.FLAGS.config.to_dict()  # a config that could not be loaded fails at its first use
        return remaining


@contextlib.contextmanager
def config_errors_in_one_line(argv):
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


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "orthojax" / "xla"))
    logging.set_verbosity(logging.WARNING)

    # Late, so that --help and a mistyped flag answer at once.
    from orthojax.errors import UserError
    from orthojax.interrupt import Interrupted
    from orthojax.train import train_and_evaluate

    workdir = flags.FLAGS.workdir or default_workdir()
    try:
        summary = train_and_evaluate(flags.FLAGS.config, workdir)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 128 + stop.signal_number
    for name, value in summary.items():
        print(f"{name:>18}  {value:,}" if isinstance(value, int | float) else f"{name:>18}  -")
    print(f"\nwritten to {workdir}: summary.json, curves.png, metrics.jsonl, checkpoints/")
    return 0


def default_workdir() -> str:
    """`runs/` and the config's name with its arguments, so that every config has its own."""
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    name, _, arguments = path.partition(":")
    name = pathlib.Path(name).stem
    return str(pathlib.Path("runs", f"{name}:{arguments}" if arguments else name))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # so that configs may import each other
    with config_errors_in_one_line(sys.argv):
        define_flags()
    app.run(main, flags_parser=parse_flags)
