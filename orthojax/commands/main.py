"""One command for who has no checkout: `orthojax train`, and what else there is."""

import importlib
import sys

from orthojax.console import escape_what_cannot_be_encoded, tell

# Word -> module of this package; its docstring is the help.
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
    if word not in COMMANDS:
        usage = f"orthojax {'|'.join(COMMANDS)} [ARGUMENTS]; --help after the word tells them"
        if word in ("-h", "-help", "--help"):
            tell(usage, sys.stdout)
            return 0
        tell(f"error: there is no command {word!r}: {usage}")
        return 2
    sys.argv[:2] = [f"orthojax {word}"]
    return importlib.import_module(f"orthojax.commands.{COMMANDS[word]}").start() or 0
