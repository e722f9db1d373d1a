"""Functions called with a section of a config as their arguments."""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_collections

from orthojax.config import schema
from orthojax.config.suggestion import suggestion
from orthojax.errors import ConfigError


def bind(function: Callable, section: Mapping, path: str, **supplied: Any) -> Any:
    """Calls `function(**section, **supplied)`, with its signature as the section's schema.

    So no key of a config is ever silently unread, and no value is of another kind than its
    parameter (see `orthojax.config.schema`). Parameters swallowed by `**kwargs`, and those that
    Flax adds to a module (`parent`, `name`), are not keys.

    Args:
      function: any callable with a signature: a function, a class, a dataclass, a Flax module.
      section: keyword arguments from the config, a Mapping or an ml_collections ConfigDict.
      path: where the section stands in the config, for the messages, such as `optimizer`.
      **supplied: keyword arguments from the program, which the config may not set.

    Raises:
      ConfigError: a key is unknown or is supplied by the program, a required one is missing, or a
        value is of the wrong kind, not finite or refused by the function; the message names `path`.

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
    try:
        return function(**{key: section[key] for key in section}, **supplied)
    except ConfigError as error:
        if not path or f"`{path}" in str(error) or prefix in str(error):
            raise
        raise ConfigError(f"`{path}`: {error}") from error


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
    # Recognized by name, so that reading a config does not import Flax.
    bases = [f"{base.__module__}.{base.__qualname__}" for base in getattr(function, "__mro__", ())]
    added = ("parent", "name") if "flax.linen.module.Module" in bases else ()
    return {n: p for n, p in parameters.items() if p.kind in keyword and n not in added}


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
