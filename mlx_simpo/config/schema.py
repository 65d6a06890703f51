"""Strict reading of settings into frozen dataclasses: an unknown name, a wrong type or an
impossible value is an error that names the field, the value, the rule and the nearest right name.

A settings class derives from `Section` and declares each field with `setting(default, help, rule)`;
that declaration is the only place where a field's default, meaning and rule stand. YAML files,
``key=value`` overrides and Python keyword arguments all end in the same checks.
"""

import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from ..errors import SimPOError
from .aliases import hint_at_name, hint_at_section
from .yaml import parse_yaml


class Rule(NamedTuple):
    """What a value must be, in words and as a test."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("greater than 0", lambda v: v > 0)
NOT_NEGATIVE = Rule("0 or greater", lambda v: v >= 0)
FRACTION = Rule("at least 0 and less than 1", lambda v: 0 <= v < 1)
SHARE = Rule("between 0 and 1", lambda v: 0 <= v <= 1)
NOT_EMPTY = Rule("not empty", lambda v: len(v) > 0)


def setting(default: Any = MISSING, help: str = "", rule: Rule | None = None) -> Any:
    """A field of a `Section`: its default (none: required), what it means, and its rule."""
    return field(default=default, metadata={"help": help, "rule": rule})


@dataclass(frozen=True)
class Section:
    """Base of the settings classes: checks types and rules however an instance is made."""

    NAME: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for item in fields(self):
            path = f"{self.NAME}.{item.name}" if self.NAME else item.name
            value = coerce(getattr(self, item.name), hints[item.name], path)
            object.__setattr__(self, item.name, value)
            rule: Rule | None = item.metadata.get("rule")
            if rule is not None and value is not None and not rule.holds(value):
                raise SimPOError(f"{path} is {value!r}; it must be {rule.text}")


class RawText(str):
    """A value from the command line: its type is decided by the field it is for."""


def from_mapping(cls: type[Section], given: Mapping[str, Any], root: type[Section]) -> Any:
    """An instance of ``cls`` from nested mappings; ``root`` is searched for the nearest name."""
    hints = typing.get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}
    values = {}
    for name, value in given.items():
        path = f"{cls.NAME}.{name}" if cls.NAME else str(name)
        if name not in known:
            hint = nearest_section(path, root) if isinstance(value, Mapping) else ""
            raise SimPOError(f"unknown setting {path!r}{hint or nearest_name(path, root)}")
        hint = hints[name]
        if is_dataclass(hint):
            value = {} if value is None else value  # all of its lines are commented out
            if not isinstance(value, Mapping):
                raise SimPOError(f"{path} is {value!r}; it must be a group of settings ({path}: …)")
            value = from_mapping(typing.cast(type[Section], hint), value, root)
        values[name] = value
    for name, item in known.items():
        if name not in values and is_required(item):
            path = f"{cls.NAME}.{name}" if cls.NAME else name
            raise SimPOError(f"{path} is missing; it must be given ({item.metadata['help']})")
    return cls(**values)


def all_settings(cls: type[Section]) -> Iterator[tuple[str, Field, Any]]:
    """(dotted name, field, type) of every setting under ``cls``, in order."""
    hints = typing.get_type_hints(cls)
    for item in fields(cls):
        hint = hints[item.name]
        if is_dataclass(hint):
            yield from all_settings(typing.cast(type[Section], hint))
        else:
            yield (f"{cls.NAME}.{item.name}" if cls.NAME else item.name), item, hint


def is_required(item: Field) -> bool:
    """Whether a setting has no default."""
    return item.default is MISSING and item.default_factory is MISSING


def nearest_name(path: str, root: type[Section]) -> str:
    """A hint at the setting under ``root`` whose name is nearest to ``path``, or where to look."""
    return hint_at_name(path, [name for name, _, _ in all_settings(root)])


def nearest_section(name: str, root: type[Section]) -> str:
    """A hint at the nearest group of settings under ``root``, or an empty string."""
    hints = typing.get_type_hints(root)
    return hint_at_section(name, [f.name for f in fields(root) if is_dataclass(hints[f.name])])


def coerce(value: Any, hint: Any, path: str) -> Any:
    """``value`` as the type ``hint`` wants it.

    An integer is taken where a real number is wanted; nothing else is converted.

    Raises:
        SimPOError: the value is not of that type.
    """
    options = options_of(hint)
    if isinstance(value, RawText):
        value = read_raw(value, options, path)
    for option in options:
        if matches(value, option):
            if option is float:
                return float(value)
            return tuple(value) if isinstance(value, list) else value
    wanted = " or ".join(describe(option) for option in options)
    raise SimPOError(f"{path} is {value!r}; it must be {wanted}")


def matches(value: Any, option: Any) -> bool:
    """Whether ``value`` is acceptable where the type ``option`` is declared."""
    if option is types.NoneType:
        return value is None
    if typing.get_origin(option) is Literal:
        return value in typing.get_args(option)
    if typing.get_origin(option) is tuple:
        return isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
    if option is float:
        return type(value) in (int, float) and is_finite(value)
    return type(value) is option


def is_finite(value: int | float) -> bool:
    """Whether a number is neither NaN nor infinite, however large."""
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def options_of(hint: Any) -> tuple[Any, ...]:
    """The members of a union; any other hint is its only one."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def read_raw(text: RawText, options: tuple[Any, ...], path: str) -> Any:
    """A command-line value: plain text where only text is wanted, else YAML (12, 1e-6, [a, b])."""
    textual = all(o in (str, types.NoneType) or typing.get_origin(o) is Literal for o in options)
    if textual:
        return None if text == "null" and types.NoneType in options else str(text)
    return parse_yaml(text, path)


def describe(option: Any) -> str:
    """An allowed type or value in the words of a message."""
    names = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}
    if option is types.NoneType:
        return "null"
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(option))
    if typing.get_origin(option) is tuple:
        return "a list of names"
    return names.get(option, getattr(option, "__name__", str(option)))
