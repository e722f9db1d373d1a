"""Overrides of a config from the command line, checked against the functions that read it.

Every argument of the function that a section stands for can be set, whether or not the config
file lists it.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Sequence

from flax.training.dynamic_scale import DynamicScale
from ml_collections import ConfigDict

from orthojax import data
from orthojax.config import schema
from orthojax.config.sections import keyword_parameters
from orthojax.config.suggestion import suggestion
from orthojax.data import folder, in_memory, streamed
from orthojax.errors import ConfigError
from orthojax.ortho import stiefel
from orthojax.parallel.mesh import make_mesh
from orthojax.sites.modulation import modulation
from orthojax.training.experiment import Settings
from orthojax.training.net import MODELS, net_named
from orthojax.training.optimizers import OPTIMIZERS, REGULARIZERS, SCHEDULES

_NAMED = {
    "model": MODELS,
    "optimizer": OPTIMIZERS,
    "optimizer.rest": OPTIMIZERS,
    "schedule": SCHEDULES,
    "regularizer": REGULARIZERS,
}
_PLAIN = {
    "": (Settings,),
    "dataset": (in_memory.load, streamed.load, folder.load),
    "modulation": (modulation,),
    "constraint": (stiefel,),
    "loss_scale": (DynamicScale,),
    "mesh": (make_mesh,),
}
_SUPPLIED = {  # by the program
    "dataset": ("records",),
    "model": ("modulated", "dtype", "num_classes"),
    "modulation": ("inner",),
    "constraint": ("inner",),
    "schedule": ("base", "steps"),
    "mesh": ("devices",),
}


@dataclasses.dataclass(frozen=True)
class Override:
    """`key=value`, and the words that it was written in, for messages."""

    key: str
    value: str
    words: str


def apply(config: ConfigDict, overrides: Sequence[Override]) -> list[str]:
    """Sets keys of a config in place; of two for the same key the last one counts.

    A section's new `name` drops the keys of the old one that the new one does not take, and all of
    a net's where the old or the new one is not of `orthojax.models`, since a key of the same name
    then means something else; what stays is named. A run made shorter than the warm-up of the
    config file has a warm-up of its own length. All this unless those keys are overridden too.

    Args:
      config: as the file has it.
      overrides: in the order of the command line.

    Returns:
      What else has changed, a sentence each.

    Raises:
      ConfigError: a key is unknown or a value is not of its kind; the message begins with the words
        of the override.
      DatasetError: `dataset.name` is overridden by a name that is unknown.

    Example:
      >>> config = ConfigDict({"optimizer": {"name": "sgd", "momentum": 0.9}})
      >>> apply(config, [Override("optimizer.name", "adam", "--config.optimizer.name=adam")])
      ['optimizer.name=adam drops momentum=0.9']
      >>> config.optimizer.to_dict()
      {'name': 'adam'}
    """
    chosen = {override.key: override for override in overrides}
    _refuse_both(chosen)
    notes = []
    with config.unlocked(), config.ignore_type():
        # Whole sections first, then names: they say which other keys there are.
        for override in sorted(chosen.values(), key=_rank):
            if override.key.endswith(".name"):
                notes += _rename(config, override, chosen)
            else:
                _set(config, override)
        notes += _shorten_warmup(config, chosen)
    return notes


def key_meant(word: str) -> str | None:
    """The key of a config that a word names, with its section or without.

    Example:
      >>> [key_meant(word) for word in ("steps", "learning_rate", "model.depth", "model", "wrkdir")]
      ['steps', 'optimizer.learning_rate', 'model.depth', 'model.name', None]
    """
    if word in (*_NAMED, "dataset"):
        return f"{word}.name"
    section, dot, last = word.rpartition(".")
    for place in (section,) if dot else ("", "optimizer", *_NAMED, *_PLAIN):
        functions = [*_PLAIN.get(place, ()), *_NAMED.get(place, {}).values()]
        if last in _known(functions, place):
            return f"{place}.{last}" if place else last
    return None


def _rank(override: Override) -> tuple[int, int]:
    depth = override.key.count(".")
    if not depth and override.key in (*_NAMED, *_PLAIN):
        return 0, depth
    return (1 if override.key.endswith(".name") else 2), depth


def _refuse_both(chosen: dict[str, Override]) -> None:
    for key, override in chosen.items():
        nearest = key.rpartition(".")[0] or key
        section = chosen.get(nearest) or chosen.get(key.partition(".")[0])
        if section is not None and section is not override:
            raise ConfigError(f"{override.words}: {section.words} sets the whole section; give one")


def _rename(config: ConfigDict, override: Override, chosen: dict[str, Override]) -> list[str]:
    section = override.key.rpartition(".")[0]
    before = (_section(config, section) or {}).get("name")
    _set(config, override)
    values = _section(config, section)
    name = values.name
    if name == before or before is None:
        return []
    if section == "dataset":
        place = chosen.get("dataset.data_dir")
        data_dir = place.value if place else config.dataset.get("data_dir")
        found = [data.implementation({"name": name, "data_dir": data_dir})]
    else:
        found = _readers(config, section, override)
    known = _known(found, section)
    if section == "model" and not {name, before} <= MODELS.keys():
        known = {}
    old = {k: v for k, v in values.items() if f"{section}.{k}" not in chosen}
    dropped = [key for key in old if key not in {"name", *known}]
    for key in dropped:
        del values[key]
    kept = [key for key in old if key in known and old[key] is not None]
    told = [
        f"{verb} {', '.join(f'{key}={old[key]}' for key in keys)}"
        for verb, keys in (("keeps", kept), ("drops", dropped))
        if keys
    ]
    return [f"{override.key}={name} {'; '.join(told)}"] if told else []


def _set(config: ConfigDict, override: Override) -> None:
    section, _, key = override.key.rpartition(".")
    try:
        found = _readers(config, section, override)
        known = _known(found, section)
        if section in _NAMED:
            known["name"] = inspect.Parameter("name", inspect.Parameter.KEYWORD_ONLY)
        if key not in known:
            raise ConfigError(
                f"unknown key `{override.key}`{_nearest(config, override.key, known)}"
            )
        accepted = schema.Kinds(frozenset({str}))
        if section not in _NAMED or key != "name":
            reader = next(f for f in found if key in keyword_parameters(f))
            accepted = schema.kinds(reader, key)
        value = schema.parse(override.value, accepted)
        schema.check(value, accepted, override.key)
    except ConfigError as error:
        raise ConfigError(f"{override.words}: {error}") from None
    if not section:
        config[key] = ConfigDict(value) if isinstance(value, dict) else value
        return
    for name in section.split("."):
        if config.get(name) is None:  # a section that the file leaves out, or sets to None
            config[name] = ConfigDict()
        config = config[name]
    config[key] = value


def _section(config: ConfigDict, section: str) -> ConfigDict | None:
    for name in section.split("."):
        config = (config or {}).get(name)
    return config


def _readers(config: ConfigDict, section: str, override: Override) -> list[Callable]:
    """The functions that take the keys of a section."""
    if section in _PLAIN:
        return list(_PLAIN[section])
    if section not in _NAMED:
        raise ConfigError(
            f"unknown section `{section}`{suggestion(section, [*_NAMED, *filter(None, _PLAIN)])}"
        )
    parent, _, key = section.rpartition(".")
    if parent and key not in (known := _known(_readers(config, parent, override), parent)):
        raise ConfigError(f"unknown key `{section}`{suggestion(key, known, f'{parent}.')}")
    registry = _NAMED[section]
    given = override.key == f"{section}.name"
    name = override.value if given else (_section(config, section) or {}).get("name")
    if section == "model":
        return [net_named(name)]
    if name not in registry:
        raise ConfigError(
            f"`{section}.name` is {name!r}{suggestion(str(name), registry, what='names')}"
        )
    return [registry[name]]


def _known(functions: Iterable[Callable], section: str) -> dict[str, inspect.Parameter]:
    found = {}
    for function in functions:
        found |= keyword_parameters(function)
    return {name: p for name, p in found.items() if name not in _SUPPLIED.get(section, ())}


def _nearest(config: ConfigDict, key: str, known: Iterable[str]) -> str:
    """What may have been meant: a key of the same section, or the same key of another one."""
    section, _, last = key.rpartition(".")
    for other in (*_NAMED, *_PLAIN):
        try:
            functions = _readers(config, other, Override(other, "", ""))
        except ConfigError:
            continue
        if other != section and last in _known(functions, other):
            path = f"{other}.{last}" if other else last
            return f"; did you mean `{path}`?"
    return suggestion(last, known, f"{section}." if section else "")


def _shorten_warmup(config: ConfigDict, chosen: dict[str, Override]) -> list[str]:
    steps, schedule = config.get("steps"), config.get("schedule") or {}
    warmup = schedule.get("warmup_steps")
    if "steps" not in chosen or "schedule.warmup_steps" in chosen or not warmup or warmup <= steps:
        return []
    config.schedule.warmup_steps = steps
    return [
        f"steps={steps}: schedule.warmup_steps is {steps} and not {warmup}, to end with the run"
    ]
