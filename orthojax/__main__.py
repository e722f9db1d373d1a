"""`orthojax COMMAND`, for who has no checkout; in one, `launch/` has the same programs."""

import importlib
import sys

from orthojax.console import escape_what_cannot_be_encoded, tell
from orthojax.errors import MissingExtraError
from orthojax.extras import require

# Word -> module of `orthojax.commands`; its docstring is the help.
COMMANDS = {
    "train": "train",
    "predict": "predict",
    "evaluate": "evaluate",
    "export": "export",
    "prepare": "prepare_data",
    "reproduce": "reproduce",
}


def main() -> int:
    """Runs `orthojax COMMAND ARGUMENTS`; returns the exit status, which is 2 for bad input."""
    escape_what_cannot_be_encoded()
    word = sys.argv[1] if len(sys.argv) > 1 else "--help"
    usage = f"orthojax {'|'.join(COMMANDS)} [ARGUMENTS]; --help after the word tells them"
    if word in ("-h", "-help", "--help"):
        tell(usage, sys.stdout)
        return 0
    if word not in COMMANDS:
        tell(f"error: there is no command {word!r}: {usage}")
        return 2
    sys.argv[:2] = [f"orthojax {word}"]
    return run(word)


def run(word: str) -> int:
    """Runs a command on `sys.argv`, if what it needs is installed."""
    try:
        require("train", f"orthojax {word}")
    except MissingExtraError as missing:
        tell(f"error: {missing}")
        return 2
    return importlib.import_module(f"orthojax.commands.{COMMANDS[word]}").start() or 0


if __name__ == "__main__":
    sys.exit(main())
