"""What the programs that take `--config` have in common: the flag, its overrides, exit statuses."""

import ast
import contextlib
import difflib
import importlib.machinery
import importlib.util
import inspect
import os
import pathlib
import re
import signal
import sys
import threading

from absl import app, flags, logging

ROOT = pathlib.Path(__file__).resolve().parent.parent
_HELP = {"-h", "-help", "--help", "--helpshort"}
_overrides: dict[str, list[str]] = {}  # by the name of the flag: words of the command line

flags.disclaim_key_flags()  # what is defined here is listed by --help as the program's


def run(define_flags, main):
    """Parses the command line and exits with what `main()` returns, or with what went wrong.

    0 is done; 2 bad input, which starting again will not mend; 128 + n stopped by signal n with
    everything saved, and the same command goes on; 1 anything else.
    """
    leave_on_signals()
    sys.path.insert(0, str(ROOT))  # so that configs may import each other
    keep_compiled_programs()  # before a config imports JAX, which reads its environment then
    try:
        app.run(lambda argv: _main(main), flags_parser=lambda argv: _parse(argv, define_flags))
    finally:
        _finish_output()


def leave_on_signals():
    """Makes Ctrl-C and SIGTERM end the program at once, and in one line.

    For the times when there is nothing to save: imports and compilation. They spend minutes in
    native code, where Python runs no handler; so a thread is told of the signal. While
    `orthojax.interrupt.stop_on_signals` has handlers of its own, this does nothing.
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
    cache = os.path.expanduser(os.environ.get("XDG_CACHE_HOME", ""))
    if not os.path.isabs(cache):  # which its specification has ignored
        cache = os.path.expanduser("~/.cache")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(cache, "orthojax", "xla"))


def tell(message, stream=None):
    """Writes a line to stderr or another stream, if anybody can still read it."""
    with contextlib.suppress(OSError, ValueError):
        print(message, file=stream or sys.stderr, flush=True)


def local_path(text: str) -> pathlib.Path:
    """A path on the command line, of which the shell has left a `~` as it is."""
    return pathlib.Path(os.path.expanduser(text))


def define_config(default="digits_plain110", name="config"):
    """Defines `--config`, and overrides `--config.KEY=VALUE`; `load_config` reads them."""
    _overrides[name] = []
    flags.DEFINE_string(
        name,
        default and f"configs/{default}.py",
        f"Config file, with its arguments after a colon: FILE.py:depth=44,method=ortho. Any key "
        f"of it: --{name}.KEY=VALUE.",
    )


def load_config(name="config"):
    """The ConfigDict that a flag names, with its overrides; None where it names none.

    Raises:
      ConfigError: there is no such file, it is no config, or an override is wrong.
    """
    from orthojax.errors import ConfigError
    from orthojax.overrides import Override, apply

    text = flags.FLAGS[name].value
    if text is None:
        if _overrides[name]:
            raise ConfigError(f"{_overrides[name][0]}: there is no --{name}=FILE.py to override")
        return None
    config = _read_config(text)
    overrides = []
    for words in _overrides[name]:
        key, _, value = words.lstrip("-").partition(".")[2].partition("=")
        overrides.append(Override(key, value, words))
    for note in apply(config, overrides):
        tell(note)
    return config


def config_name(name="config") -> str:
    """The config's name with its arguments, fit for a path: `cifar10_plain-depth=110`."""
    path, _, arguments = flags.FLAGS[name].value.partition(":")
    words = [pathlib.Path(path).stem, *arguments.split(",")]
    return "-".join(re.sub(r"[^\w=.+-]+", "_", word.strip()) for word in words if word.strip())


def override_words(name="config") -> list[str]:
    """What the command line overrides, as it was written: `model.width=8`."""
    return [words.partition(".")[2] for words in _overrides[name]]


def _read_config(text):
    from ml_collections import ConfigDict

    from orthojax.errors import ConfigError, UserError

    path, colon, arguments = text.partition(":")
    file = _find_config(path)
    try:
        loader = importlib.machinery.SourceFileLoader("config_file", str(file))
        module = importlib.util.module_from_spec(
            importlib.util.spec_from_loader("config_file", loader)
        )
        loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # whatever a file of Python can raise
        raise ConfigError(f"{file} cannot be read: {_of_user_code(error, file)}") from error
    get_config = getattr(module, "get_config", None)
    if not callable(get_config):
        raise ConfigError(f"{file} defines no function get_config, which returns the config")
    try:
        inspect.signature(get_config).bind(*([arguments] if colon else []))
    except TypeError:
        raise ConfigError(f"--config={text}: {file} takes no arguments after a colon") from None
    try:
        config = get_config(*([arguments] if colon else []))
    except UserError:
        raise
    except Exception as error:
        raise ConfigError(f"--config={text}: {_of_user_code(error, file)}") from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise ConfigError(
            f"{file}: get_config returns a {kind}; it must be an ml_collections.ConfigDict"
        )
    return config


def _find_config(path):
    """A config file: in the current directory, or else in the checkout."""
    from orthojax.errors import ConfigError

    given = local_path(path)
    looked_for = list(dict.fromkeys([given.absolute(), ROOT / given]))
    for file in looked_for:
        if file.is_file():
            return file
    known = [f"configs/{file.name}" for file in sorted((ROOT / "configs").glob("*.py"))]
    stems = {pathlib.PurePath(name).stem: name for name in known}
    [nearest] = difflib.get_close_matches(given.stem, stems, n=1, cutoff=0.5) or [None]
    hint = f"did you mean {stems[nearest]}?" if nearest else f"there are {', '.join(known)}"
    raise ConfigError(
        f"there is no config file {path!r}; {hint} Looked for\n  "
        + "\n  ".join(map(str, looked_for))
    )


def _of_user_code(error, file):
    """What an exception of a config file says, and in which line."""
    line = getattr(error, "lineno", None)
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == str(file):
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    where = f"line {line}: " if line else ""
    return f"{where}{type(error).__name__}: {error}"


def _parse(argv, define_flags):
    define_flags()
    if _HELP & set(argv[1:]):
        tell(_help(), sys.stdout)
        sys.exit(0)
    try:
        words = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
        try:
            remaining = flags.FLAGS(_without_overrides(words))
        except SystemExit:  # of absl's --helpfull, which calls that a failure
            sys.exit(0)
        if len(remaining) > 1:
            raise flags.Error(f"unexpected arguments: {' '.join(remaining[1:])}; see --help")
        return remaining
    except flags.Error as error:
        tell(f"error: {error}")
        sys.exit(2)


def _without_overrides(argv):
    """Takes the words `--config.KEY=VALUE` out of a command line and keeps them in `_overrides`.

    Also `--config.KEY VALUE`, and `--config.KEY` and `--noconfig.KEY` for true and false.
    """
    kept = []
    words = iter(range(len(argv)))
    for index in words:
        word = argv[index]
        if word == "--":
            return [*kept, *argv[index:]]
        found = re.fullmatch(r"--?(no)?(\w+)\.([^=]*)(=.*)?", word, re.DOTALL)
        if not found or found[2] not in _overrides:
            kept.append(word)
            continue
        negated, name, key, value = found.groups()
        if value is None and not negated and argv[index + 1 : index + 2]:
            following = argv[index + 1]
            if not following.startswith("--"):
                value = f"={following}"
                next(words)
        if value is None:
            value = "=false" if negated else "=true"
        _overrides[name].append(f"--{name}.{key}{value}")
    return kept


def _help():
    """The program's docstring, its flags, the configs with their arguments."""
    program = sys.modules["__main__"]
    lines = [(program.__doc__ or "").strip(), "", flags.FLAGS.main_module_help().strip(), ""]
    lines += ["configs, each with its arguments (defaults in parentheses):"]
    for file in sorted((ROOT / "configs").glob("*.py")):
        tree = ast.parse(file.read_text())
        lines += ["", f"  configs/{file.name}: {(ast.get_docstring(tree) or '').splitlines()[0]}"]
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == "get_config":
                text = ast.get_docstring(node) or ""
                lines += [f"    {line}" for line in text.splitlines()]
    lines += [
        "",
        "example:",
        f"  python launch/{pathlib.Path(sys.argv[0]).name} "
        "--config=configs/cifar10_plain.py:depth=110,method=isometric "
        "--config.optimizer.learning_rate=0.01",
    ]
    return "\n".join(lines)


def _main(main):
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
        tell(f"error: {error}")
        return 2
    except Interrupted as stop:
        tell(stop)
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
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), stream.fileno())
