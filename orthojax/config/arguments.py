"""Typed arguments of a config: what follows the colon of `--config=FILE.py:depth=44`."""

import math
from types import SimpleNamespace
from typing import Any

from orthojax.config.schema import TRUTHS
from orthojax.config.suggestion import suggestion
from orthojax.errors import ConfigError

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


def _parse_value(key: str, value: str, default: Any) -> Any:
    if isinstance(default, tuple):
        if value in default:
            return value
        raise ConfigError(f"config argument `{key}={value}`: must be {' or '.join(default)}")
    try:
        parsed = TRUTHS[value.lower()] if isinstance(default, bool) else type(default)(value)
        if isinstance(parsed, float) and not math.isfinite(parsed):
            raise ValueError(value)
        return parsed
    except (KeyError, ValueError):
        expected = _EXPECTED[type(default)]
        raise ConfigError(f"config argument `{key}={value}`: must be {expected}") from None
