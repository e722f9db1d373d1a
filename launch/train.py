"""Trains what a config describes, or goes on where the same command stopped.

python launch/train.py                                        # 110 plain layers on the digits
python launch/train.py --config=configs/cifar10_plain.py:preset=cpu --workdir=runs/cifar
python launch/train.py --config.optimizer.learning_rate=0.05  # any key of the config
"""

import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # so that configs may import each other

CONFIG = config_flags.DEFINE_config_file(
    "config",
    str(ROOT / "configs" / "digits_plain110.py"),
    "Config file, with its arguments after a colon: FILE.py:depth=44,method=ortho.",
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Directory of this run's own; runs/<config name> by default."
)


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

    workdir = WORKDIR.value or default_workdir()
    try:
        summary = train_and_evaluate(CONFIG.value, workdir)
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
    app.run(main)
