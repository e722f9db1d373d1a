"""Which values a parameter of a function takes from a config, by its annotation and its default."""

import ast
import collections.abc
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

import ml_collections

from orthojax.errors import ConfigError

TRUTHS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_NAMES = {
    bool: "true or false",
    int: "an integer",
    float: "a finite number",
    str: "a string",
    tuple: "a tuple",
    dict: "a section of keys and values",
    type(None): "None",
}
_SAME_AS = {
    list: tuple,
    collections.abc.Sequence: tuple,
    collections.abc.Iterable: tuple,
    collections.abc.Mapping: dict,
}


@dataclasses.dataclass(frozen=True)
class Kinds:
    """What a value may be.

    Attributes:
      types: of `bool, int, float, str, tuple, dict, NoneType`; empty is anything.
      elements: likewise, of the elements of a tuple; empty is anything.
    """

    types: frozenset[type] = frozenset()
    elements: frozenset[type] = frozenset()

    def __str__(self) -> str:
        names = [name for kind, name in _NAMES.items() if kind in self.types]
        if float in self.types and int in self.types:
            names.remove(_NAMES[int])
        if self.elements and tuple in self.types:
            inside = " or ".join(name for kind, name in _NAMES.items() if kind in self.elements)
            names[names.index("a tuple")] = f"a tuple, of which every element is {inside}"
        return " or ".join(names)


def kinds(function: Callable, name: str) -> Kinds:
    """What the parameter `name` of a function, class, dataclass or Flax module takes.

    An annotation that says nothing, such as `Any`, leaves it to the type of the default; a
    parameter without either takes anything.

    Example:
      >>> def schedule(base: float, steps: int | None, boundaries: tuple[float, ...] = (0.5,)): ...
      >>> [str(kinds(schedule, name)) for name in ("base", "steps")]
      ['a finite number', 'an integer or None']
    """
    parameter = inspect.signature(function).parameters[name]
    try:
        annotation = typing.get_type_hints(function)[name]
    except (KeyError, NameError, TypeError, AttributeError):
        # A class without annotated fields, or annotations that cannot be looked up from here.
        annotation = parameter.annotation
    found = _of_annotation(annotation)
    default = parameter.default
    if found is None and isinstance(default, bool | int | float | str | tuple):
        kind = next(k for k in _NAMES if isinstance(default, k))
        # A number may have a fraction even if its default has none.
        found = frozenset({float if kind is int else kind, type(None)})
    if found is None:
        return Kinds()
    if default is None:
        found |= {type(None)}
    if float in found and not isinstance(default, bool):
        found -= {bool}  # `jax.typing.ArrayLike` has both
    return Kinds(found, _of_elements(annotation))


def check(value: Any, accepted: Kinds, path: str) -> None:
    """Raises `ConfigError`, with the path, unless a value is one of the accepted.

    Only what a config file or a command line can say is looked at: arrays and functions pass.

    Example:
      >>> check(0.5, Kinds(frozenset({int})), "steps")
      Traceback (most recent call last):
      ...
      orthojax.errors.ConfigError: `steps` is 0.5; it must be an integer
    """
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"`{path}` is {value}, which is not a finite number")
    if accepted.types and not _is_one_of(value, accepted.types):
        raise ConfigError(f"`{path}` is {value!r}; it must be {accepted}")
    if isinstance(value, tuple | list):
        inside = accepted.elements
        if not all(_is_one_of(v, inside) and not _is_infinite(v) for v in value):
            raise ConfigError(f"`{path}` is {value!r}; it must be {accepted or 'finite'}")


def parse(text: str, accepted: Kinds) -> Any:
    """The value that a text on the command line stands for; `check` says whether it will do.

    Example:
      >>> parse("(0.5,0.75)", Kinds(frozenset({tuple}))), parse("none", Kinds(frozenset({str})))
      ((0.5, 0.75), 'none')
      >>> parse("True", Kinds(frozenset({bool}))), parse("None", Kinds(frozenset({float})))
      (True, None)
    """
    takes = accepted.types
    literal = _literal(text)
    if str in takes:
        if literal is None and type(None) in takes:
            return None
        only_text = not takes & {bool, int, float, tuple}
        return literal if isinstance(literal, str) or not only_text else text
    if text.lower() in ("none", "null"):
        return None
    if bool in takes and text.lower() in TRUTHS:
        return TRUTHS[text.lower()]
    if float in takes and isinstance(literal, str | int) and not isinstance(literal, bool):
        try:
            return literal if int in takes and isinstance(literal, int) else float(literal)
        except (ValueError, OverflowError):  # no number, or an integer beyond all floats
            return literal
    if tuple in takes and isinstance(literal, bool | int | float):
        return (literal,)
    if not takes and text.lower() in ("true", "false"):
        return TRUTHS[text.lower()]
    return literal


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text.strip())
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return text


def _of_annotation(annotation: Any) -> frozenset[type] | None:
    """The kinds of an annotation, or None where it says nothing."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        parts = typing.get_args(annotation)
        if Any in parts:
            return None
        found = [kind for part in parts if (kind := _of_annotation(part))]
        known = frozenset().union(*found)
        return None if known <= {type(None)} else known
    kind = origin or annotation
    kind = _SAME_AS.get(kind, kind)
    return frozenset({kind}) if isinstance(kind, type) and kind in _NAMES else None


def _of_elements(annotation: Any) -> frozenset[type]:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return frozenset().union(*map(_of_elements, typing.get_args(annotation)))
    if _SAME_AS.get(typing.get_origin(annotation), typing.get_origin(annotation)) is not tuple:
        return frozenset()
    found = [_of_annotation(part) for part in typing.get_args(annotation) if part is not ...]
    return frozenset().union(*(kind for kind in found if kind))


def _is_one_of(value: Any, accepted: frozenset[type]) -> bool:
    if not accepted:
        return True
    if value is None or isinstance(value, bool | str):
        return type(value) in accepted
    if isinstance(value, int):
        return bool(accepted & {int, float})
    if isinstance(value, float):
        return float in accepted
    if isinstance(value, tuple | list):
        return tuple in accepted
    if isinstance(value, Mapping | ml_collections.ConfigDict):
        return dict in accepted
    return True


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
