"""What all programs have in common: signals, the compilation cache, help and exit statuses."""

import ast
import functools
import os
import pathlib
import signal
import sys
import threading

import jax
from absl import app, flags, logging

from orthojax.caches import cache_directory, keep_private
from orthojax.commands.config_flag import shipped_configs, without_overrides
from orthojax.commands.overrides import key_meant
from orthojax.console import escape_what_cannot_be_encoded, tell
from orthojax.errors import UserError, is_permanent
from orthojax.parallel.rendezvous import ProcessesMissing

_HELP = {"-h", "-help", "--help", "--helpshort"}

flags.disclaim_key_flags()  # what is defined here is listed by --help as the program's


def run(define_flags, main, arguments=None):
    """Parses the command line and exits with what `main()` returns, or with what went wrong.

    With `arguments`, a word for what may stand beside the flags, `main` is given a list of them.

    0 is done; 2 bad input, or storage that refuses what it would refuse again (see
    `orthojax.errors.is_permanent`): starting again will not mend it; 128 + n stopped by signal n
    with everything saved, and the same command goes on; 1 anything else.
    """
    escape_what_cannot_be_encoded()
    leave_on_signals()
    keep_compiled_programs()
    try:
        app.run(
            lambda argv: _main(functools.partial(main, argv[1:]) if arguments else main),
            flags_parser=lambda argv: _parse(argv, define_flags, arguments),
        )
    finally:
        _finish_output()


def define_trained():
    """Defines the flags of a program that uses a trained net; `load_trained` reads them."""
    flags.DEFINE_string("workdir", None, "Of the run.", required=True)
    flags.DEFINE_string(
        "step",
        "latest",
        "Which checkpoint: latest, its step, or best, by validation accuracy (of a run with "
        "dataset.validation).",
    )
    flags.DEFINE_string(
        "own_net",
        None,
        "package.module:Net of the run, if it is none of orthojax.models: that module is run.",
    )


def load_trained():
    """The `Classifier` that the flags name."""
    from orthojax.inference import load_classifier

    options = flags.FLAGS
    return load_classifier(options.workdir, options.step, options.own_net)


def leave_on_signals():
    """Makes Ctrl-C and SIGTERM end the program at once, and in one line.

    For the times when there is nothing to save: imports and compilation. They spend minutes in
    native code, where Python runs no handler; so a thread is told of the signal. While
    `orthojax.training.interrupt.stop_on_signals` has handlers of its own, this does nothing.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)

    def leave(number, frame):
        """Does nothing: the thread leaves."""

    def watch():
        while True:
            number = os.read(read, 1)[0]
            if signal.getsignal(number) is leave:
                tell(f"\n{signal.Signals(number).name}: stopped at once; what was saved stays")
                os._exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    if hasattr(os, "register_at_fork"):  # the signals of a forked child are not the parent's
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=watch, daemon=True).start()


def keep_compiled_programs():
    """Has JAX keep what it compiles for the next start, unless the environment says where."""
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if chosen is None:
        directory = cache_directory("xla")
        if directory is None:
            return
        try:
            keep_private(directory)
        except OSError as error:
            tell(f"compiled programs are not kept: {error}")
            return
        chosen = os.environ["JAX_COMPILATION_CACHE_DIR"] = str(directory)
    jax.config.update("jax_compilation_cache_dir", chosen)


def program_name() -> str:
    """How this program was started: `orthojax train`, `python launch/train.py`, `python -m …`."""
    if sys.argv[0].startswith("orthojax "):
        return sys.argv[0]
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return f"python -m {spec.name}"
    path = pathlib.Path(sys.argv[0])
    return f"python {path.parent.name}/{path.name}"


def _parse(argv, define_flags, arguments):
    define_flags()
    if _HELP & set(argv[1:]):
        tell(_help(define_flags.__module__), sys.stdout)
        sys.exit(0)
    try:
        words = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        try:
            remaining = flags.FLAGS(without_overrides(words))
        except SystemExit:  # of absl's --helpfull, which calls that a failure
            sys.exit(0)
        if len(remaining) > 1 and not arguments:
            raise flags.Error(f"unexpected arguments: {' '.join(remaining[1:])}; see --help")
        return remaining
    except flags.Error as error:
        tell(f"error: {error}{_hint(error)}")
        sys.exit(2)


def _hint(error):
    """Where a flag that there is not has the name of a key of the config: how that is set."""
    if "config" not in flags.FLAGS or not isinstance(error, flags.UnrecognizedFlagError):
        return ""
    key = key_meant(error.flagname)
    return f"; a key of the config is set by --config.{key}=VALUE" if key else ""


def _help(module):
    """The program's docstring, its flags, the configs with their arguments."""
    documentation = (sys.modules[module].__doc__ or "").strip()
    lines = [documentation, "", flags.FLAGS.module_help(module).strip(), ""]
    if "config" not in flags.FLAGS:
        return "\n".join(lines)
    lines += ["configs, each with its arguments (defaults in parentheses):"]
    for name, file in shipped_configs().items():
        tree = ast.parse(file.read_bytes())
        lines += ["", f"  {name}: {(ast.get_docstring(tree) or '').splitlines()[0]}"]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "get_config":
                text = ast.get_docstring(node) or ""
                lines += [f"    {line}" for line in text.splitlines()]
    lines += [
        "",
        "example:",
        f"  {program_name()} --config=cifar10_plain:depth=110,method=near_isometric "
        "--config.optimizer.learning_rate=0.01",
    ]
    return "\n".join(lines)


def _main(main):
    logging.set_verbosity(logging.WARNING)
    return exit_status(main)


def exit_status(main):
    """What `main()` returns, or what went wrong, told in a line; see `run` for the numbers."""
    # Late, so that --help and a mistyped flag answer at once.
    from orthojax.training.interrupt import Interrupted

    try:
        return main() or 0
    except UserError as error:
        tell(f"error: {error}")
        return 2
    except OSError as error:
        if not is_permanent(error):
            raise
        tell(f"error: {error}")
        return 2
    except Interrupted as stop:
        tell(str(stop))
        return 128 + stop.signal_number
    except ProcessesMissing as missing:
        tell(f"error: {missing}")
        return 1


def _finish_output():
    """Writes out what is left; what cannot be written is no reason for another exit status."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            # Python would try once more at its end, and fail with 120.
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
