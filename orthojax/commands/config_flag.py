"""The flag `--config`: the file that it names, its arguments after a colon, and its overrides."""

import difflib
import hashlib
import importlib.machinery
import importlib.util
import inspect
import os
import pathlib
import re

from absl import flags

from orthojax.commands.overrides import Override, apply
from orthojax.console import tell
from orthojax.errors import ConfigError, UserError
from orthojax.storage.paths import local_path
from orthojax.storage.workdir import may_differ

_LONGEST_NAME = 200  # bytes; file systems take 255, and there are names made of this one
_overrides: dict[str, list[str]] = {}  # by the name of the flag: words of the command line

flags.disclaim_key_flags()  # what is defined here is listed by --help as the program's


def define_config(default="digits_plain110", name="config"):
    """Defines `--config`, and overrides `--config.KEY=VALUE`; `load_config` reads them."""
    _overrides[name] = []
    flags.DEFINE_string(
        name,
        default,
        "Config, by name or file, with its arguments after a colon: "
        f"cifar10_plain:depth=44,method=paper. Any key of it: --{name}.KEY=VALUE.",
    )


def load_config(name="config"):
    """The ConfigDict that a flag names, with its overrides; None where it names none.

    Raises:
      ConfigError: there is no such file, it is no config, or an override is wrong.
    """
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


def run_name(name="config") -> str:
    """The config's name with its arguments and overrides: `cifar10_plain-depth=110-seed=1`.

    Fit for a path: of an override too long for that its digest stands at the end. Overrides in
    which one run may differ from start to start, such as `steps`, are left out.
    """
    path, arguments = split_arguments(flags.FLAGS[name].value)
    overridden = {word.partition("=")[0]: word for word in override_words(name)}
    kept = (word for key, word in sorted(overridden.items()) if not may_differ(key))
    words = [pathlib.Path(path).stem, *(arguments or "").split(","), *kept]
    found = "-".join(re.sub(r"[^\w=.+-]+", "_", word.strip()) for word in words if word.strip())
    if len(os.fsencode(found)) <= _LONGEST_NAME:
        return found
    digest = hashlib.sha256(found.encode(errors="surrogateescape")).hexdigest()[:16]
    return f"{os.fsencode(found)[: _LONGEST_NAME - 17].decode(errors='ignore')}-{digest}"


def override_words(name="config") -> list[str]:
    """What the command line overrides, as it was written: `model.width=8`."""
    return [words.partition(".")[2] for words in _overrides[name]]


def _read_config(text):
    from ml_collections import ConfigDict

    path, arguments = split_arguments(text)
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
    given = [] if arguments is None else [arguments]
    try:
        inspect.signature(get_config).bind(*given)
    except TypeError:
        raise ConfigError(f"--config={text}: {file} takes no arguments after a colon") from None
    try:
        config = get_config(*given)
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


def shipped_configs() -> dict[str, pathlib.Path]:
    """The files of `configs/`, by name; an installed package carries them along."""
    spec = importlib.util.find_spec("orthojax.configs")
    if spec is None:
        raise ConfigError(
            "the package orthojax.configs is not installed; install orthojax-nets anew"
        )
    [directory] = spec.submodule_search_locations
    files = sorted(pathlib.Path(directory).glob("[!_]*.py"))
    return {file.stem: file for file in files}


def split_arguments(text: str) -> tuple[str, str | None]:
    """A config's file and its arguments, or None: what follows the colon, of which a path may have.

    Example:
      >>> split_arguments("cifar10_plain:depth=110"), split_arguments(r"C:\\mine.py")
      (('cifar10_plain', 'depth=110'), ('C:\\\\mine.py', None))
    """
    colons = [index for index, character in enumerate(text) if character == ":"]
    places = [len(text), *reversed(colons)]
    for place in places:
        if _existing_config(text[:place]):
            break
    else:  # none: arguments are no path
        place = next((p for p in reversed(places) if not re.search(r"[/\\]", text[p:])), len(text))
    return text[:place], None if place == len(text) else text[place + 1 :]


def _existing_config(path):
    """A config file in the current directory, or else one that is shipped, by its name."""
    given = local_path(path)
    if given.is_file():
        return given.absolute()
    shipped = shipped_configs()
    # `configs/cifar10_plain.py` too, from anywhere; but not somebody's own directory.
    named = given.name in (given.stem, f"{given.stem}.py")
    if named and given.stem in shipped and str(given.parent) in (".", "configs"):
        return shipped[given.stem]
    return None


def _find_config(path):
    file = _existing_config(path)
    if file is not None:
        return file
    given, shipped = local_path(path), shipped_configs()
    [nearest] = difflib.get_close_matches(given.stem, shipped, n=1, cutoff=0.5) or [None]
    hint = f"did you mean {nearest}?" if nearest else f"there are {', '.join(shipped)}."
    raise ConfigError(
        f"there is no config {path!r}; {hint} It is no file ({given.absolute()}) and none that "
        "comes with orthojax"
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


def without_overrides(argv):
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
