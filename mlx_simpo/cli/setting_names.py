"""Which setting an option or word means: ``--learning-rate`` is train.learning_rate."""

import functools
import typing
from typing import Any, Literal, NamedTuple

from ..config.schema import all_settings, section_classes
from ..config.simpo_config import SimPOConfig
from ..config.value_types import union_members

# How an option is read: a flag may be without a value, a list has one or more, values may be one
# text or a list.
Kind = Literal["flag", "value", "values", "list"]


class Known(NamedTuple):
    """A setting that a name means. name: with its section; kind: how an option for it is read."""

    name: str
    kind: Kind


@functools.cache
def kinds() -> dict[str, Kind]:
    """Return how options for all settings are read, by the settings' names."""
    return {name: _kind(hint) for name, _, hint in all_settings(SimPOConfig)}


def is_setting(name: str) -> bool:
    """Return whether a name with its section is a setting, or a part of one that has parts."""
    return name in kinds() or any(name.startswith(f"{whole}.") for whole in _with_parts())


def is_section(name: str) -> bool:
    """Return whether a name is that of a section of settings."""
    return any(name == section.NAME for section in section_classes(SimPOConfig))


def setting_named(text: str) -> Known | None:
    """Return the setting that a name means: all of its name, or an end of it that no other has.

    Hyphens, underscores and dots are the same: ``learning-rate``, ``train.learning_rate`` and
    ``train-learning-rate`` are train.learning_rate.
    """
    head, part = text.lstrip("-"), ""
    while head and not (part and is_section(head)):  # train.stepz is no part of data.train
        if (name := _by_end().get(_plain(head))) and (not part or name in _with_parts()):
            return Known(f"{name}.{part}", "value") if part else Known(name, kinds()[name])
        head, _, first = head.rpartition(".")
        part = f"{first}.{part}" if part else first
    return None


@functools.cache
def _by_end() -> dict[str, str]:
    """Return all settings by the ends of their names that mean only one of them."""
    by_end: dict[str, set[str]] = {}
    for name in kinds():
        parts = name.split(".")
        for start in range(len(parts)):
            by_end.setdefault(_plain(".".join(parts[start:])), set()).add(name)
    whole = {_plain(name): name for name in kinds()}
    return {end: next(iter(names)) for end, names in by_end.items() if len(names) == 1} | whole


@functools.cache
def _with_parts() -> frozenset[str]:
    """Return the settings whose values have names of their own (data.columns.prompt)."""
    return frozenset(
        name
        for name, _, hint in all_settings(SimPOConfig)
        if any(_has_parts(member) for member in union_members(hint))
    )


def _has_parts(member: Any) -> bool:
    return typing.get_origin(member) is dict or hasattr(member, "__dataclass_fields__")


def _kind(hint: Any) -> Kind:
    members = union_members(hint)
    if bool in members:
        return "flag"
    if not any(typing.get_origin(member) is tuple for member in members):
        return "value"
    return "values" if str in members else "list"


def _plain(text: str) -> str:
    return text.lower().replace("-", "_").replace(".", "_")
