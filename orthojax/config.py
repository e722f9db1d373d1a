"""Typed config arguments, and functions called with a section of a config as their arguments."""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import ml_collections

from orthojax import schema
from orthojax.errors import ConfigError

_TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_EXPECTED = {bool: "true or false", int: "an integer", float: "a finite number"}


def parse_arguments(text: str | None, **defaults: Any) -> SimpleNamespace:
    """Reads `key=value,key=value` into the types of the defaults.

    Args:
      text: what follows the colon in `--config=FILE.py:depth=44,method=ortho`; None or an empty
        string leaves every default.
      **defaults: the known names, each with a bool, int, float or str as its default, or with a
        tuple of strings: the choices, of which the first is the default.

    Returns:
      A namespace with one attribute for each default.

    Raises:
      ConfigError: a name is unknown or set twice, or a value is not of its type or choice.

    Example:
      >>> parse_arguments("depth=44,method=ortho", depth=110, method=("sgd", "ortho"), bias=2.0)
      namespace(depth=44, method='ortho', bias=2.0)
    """
    values = {k: d[0] if isinstance(d, tuple) else d for k, d in defaults.items()}
    seen: set[str] = set()
    for part in text.split(",") if text else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise ConfigError(f"config argument `{part}` is not of the form key=value")
        if key not in defaults:
            raise ConfigError(f"unknown config argument `{key}`{suggestion(key, defaults)}")
        if key in seen:
            raise ConfigError(f"config argument `{key}` is set twice")
        seen.add(key)
        values[key] = _parse_value(key, value, defaults[key])
    return SimpleNamespace(**values)


def bind(function: Callable, section: Mapping, path: str, **supplied: Any) -> Any:
    """Calls `function(**section, **supplied)`, with its signature as the section's schema.

    So no key of a config is ever silently unread, and no value is of another kind than its
    parameter (see `orthojax.schema`). Parameters swallowed by `**kwargs`, and those that Flax adds
    to a module (`parent`, `name`), are not keys.

    Args:
      function: any callable with a signature: a function, a class, a dataclass, a Flax module.
      section: keyword arguments from the config, a Mapping or an ml_collections ConfigDict.
      path: where the section stands in the config, for the messages, such as `optimizer`.
      **supplied: keyword arguments from the program, which the config may not set.

    Raises:
      ConfigError: a key is unknown or is supplied by the program, a required one is missing, or a
        value is of the wrong kind or not finite.

    Example:
      >>> def momentum(learning_rate, decay=0.9, *, steps):
      ...     return learning_rate, decay, steps
      >>> bind(momentum, {"learning_rate": 0.1}, "optimizer", steps=150)
      (0.1, 0.9, 150)
    """
    if not _is_mapping(section):
        raise ConfigError(f"`{path}` must be a section of keys and values, not {section!r}")
    parameters = keyword_parameters(function)
    known = [name for name in parameters if name not in supplied]
    prefix = f"{path}." if path else ""
    for key in section:
        if key in supplied:
            raise ConfigError(f"`{prefix}{key}` is set by the program; take it out of the config")
        if key not in known:
            raise ConfigError(f"unknown key `{prefix}{key}`{suggestion(key, known, prefix)}")
        schema.check(section[key], schema.kinds(function, key), f"{prefix}{key}")
    missing = [
        f"`{prefix}{name}`"
        for name in known
        if parameters[name].default is inspect.Parameter.empty and name not in section
    ]
    if missing:
        raise ConfigError(f"missing from the config: {', '.join(missing)}")
    return function(**{key: section[key] for key in section}, **supplied)


def differences(old: Mapping, new: Mapping) -> list[str]:
    """Lists in which flattened keys two configs differ, in alphabetical order.

    A tuple equals a list of the same elements, since JSON cannot tell them apart.

    Example:
      >>> old = {"optimizer": {"learning_rate": 0.1, "momentum": 0.9}}
      >>> differences(old, {"optimizer": {"learning_rate": 0.05}, "seed": 1})
      ['optimizer.learning_rate: 0.1 -> 0.05', 'optimizer.momentum: 0.9 removed', 'seed: 1 added']
    """
    before, after = dict(_flatten(to_json(old))), dict(_flatten(to_json(new)))
    lines = []
    for key in sorted(before.keys() | after.keys()):
        if key not in after:
            lines.append(f"{key}: {before[key]!r} removed")
        elif key not in before:
            lines.append(f"{key}: {after[key]!r} added")
        elif not _same(before[key], after[key]):
            lines.append(f"{key}: {before[key]!r} -> {after[key]!r}")
    return lines


def to_json(config: Any, path: str = "") -> Any:
    """Turns a config into plain dicts, lists, strings, finite numbers, booleans and None.

    Raises:
      ConfigError: a value has no counterpart in JSON; the message names its key.

    Example:
      >>> to_json(ml_collections.ConfigDict({"model": {"depth": 44, "widths": (16, 32)}}))
      {'model': {'depth': 44, 'widths': [16, 32]}}
    """
    if _is_mapping(config):
        return {str(k): to_json(v, f"{path}.{k}" if path else str(k)) for k, v in config.items()}
    if isinstance(config, tuple | list):
        return [to_json(value, f"{path}[{i}]") for i, value in enumerate(config)]
    if isinstance(config, float) and not math.isfinite(config):
        raise ConfigError(f"`{path}` is {config}, which is not a finite number")
    if config is None or isinstance(config, bool | int | float | str):
        return config
    raise ConfigError(
        f"`{path}` is a {type(config).__name__}; a config holds only numbers, strings, booleans, "
        "None, and tuples, lists and sections of these"
    )


def from_json(value: Any) -> Any:
    """Undoes `to_json`: dicts become ConfigDicts, and lists become tuples.

    Example:
      >>> from_json({"model": {"widths": [16, 32]}}).model.widths
      (16, 32)
    """
    if isinstance(value, dict):
        return ml_collections.ConfigDict({key: from_json(item) for key, item in value.items()})
    return tuple(from_json(item) for item in value) if isinstance(value, list) else value


def keyword_parameters(function: Callable) -> dict[str, inspect.Parameter]:
    """The parameters of a function that a section of a config may set; see `bind`."""
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters
    # Recognised by name, so that reading a config does not import Flax.
    bases = [f"{base.__module__}.{base.__qualname__}" for base in getattr(function, "__mro__", ())]
    added = ("parent", "name") if "flax.linen.module.Module" in bases else ()
    return {n: p for n, p in parameters.items() if p.kind in keyword and n not in added}


def suggestion(key: str, known: Iterable[str], prefix: str = "", what: str = "keys") -> str:
    """The end of a message about an unknown key: the nearest one, and all there are.

    Example:
      >>> suggestion("lr", ["learning_rate", "momentum"], "optimizer.")
      '; did you mean `optimizer.learning_rate`? known keys: learning_rate, momentum'
    """
    known = list(known)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5) or [
        name for name in known if key == "".join(word[:1] for word in name.split("_"))
    ]
    question = f"; did you mean `{prefix}{nearest[0]}`?" if nearest else "."
    return f"{question} known {what}: {', '.join(known) or 'none'}"


def _parse_value(key: str, value: str, default: Any) -> Any:
    if isinstance(default, tuple):
        if value in default:
            return value
        raise ConfigError(f"config argument `{key}={value}`: must be {' or '.join(default)}")
    try:
        parsed = _TRUTHS[value.lower()] if isinstance(default, bool) else type(default)(value)
        if isinstance(parsed, float) and not math.isfinite(parsed):
            raise ValueError(value)
        return parsed
    except (KeyError, ValueError):
        expected = _EXPECTED[type(default)]
        raise ConfigError(f"config argument `{key}={value}`: must be {expected}") from None


def _is_mapping(value: Any) -> bool:
    # ConfigDict quacks like a mapping but is not registered as one.
    return isinstance(value, Mapping | ml_collections.ConfigDict)


def _flatten(tree: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(tree, dict) and (tree or not path):
        for key, value in tree.items():
            yield from _flatten(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


def _same(old: Any, new: Any) -> bool:
    # In Python True == 1, but a config that says `true` does not mean one.
    return old == new and isinstance(old, bool) == isinstance(new, bool)
