"""Strict reading of settings into frozen dataclasses.

An unknown name, a wrong type or an invalid value is an error that names the setting, the value, the
rule and, for an unknown name, the nearest one that exists.

A settings class derives from `Section` and declares each field with `setting(default, help, rule)`.
A default, a help text and a rule are written there and nowhere else: YAML files, ``name=value``
overrides and Python keyword arguments all go through the same checks.
"""

import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from ..errors import SimPOError, has_secret
from .aliases import hint_at_name, hint_at_section
from .yaml import parse_yaml


class Rule(NamedTuple):
    """What a value must satisfy: in words, for messages, and as a predicate."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("greater than 0", lambda v: v > 0)
NON_NEGATIVE = Rule("0 or greater", lambda v: v >= 0)
FRACTION = Rule("at least 0 and less than 1", lambda v: 0 <= v < 1)
SHARE = Rule("between 0 and 1", lambda v: 0 <= v <= 1)
NON_EMPTY = Rule("not empty", lambda v: len(v) > 0)


# May a setting differ when a run is resumed? "same": no. "free": yes; the training stays the same,
# bit for bit. "rounding": yes; the training is the same up to rounding (and the masks of dropout).
OnResume = Literal["same", "free", "rounding"]


def setting(
    default: Any = MISSING,
    help: str = "",
    rule: Rule | None = None,
    on_resume: OnResume = "same",
) -> Any:
    """Declare a field of a `Section`; without a default it is required."""
    return field(default=default, metadata={"help": help, "rule": rule, "on_resume": on_resume})


@dataclass(frozen=True)
class Section:
    """Base of the settings classes: checks types and rules whenever an instance is created."""

    NAME: ClassVar[str] = ""  # the name of the section in YAML; empty for the root

    def __post_init__(self) -> None:
        """Convert and check every field.

        Raises:
            SimPOError: a value of the wrong type, one that breaks its rule, or a token.
        """
        hints = typing.get_type_hints(type(self))
        for item in fields(self):
            path = f"{self.NAME}.{item.name}" if self.NAME else item.name
            value = coerce(getattr(self, item.name), hints[item.name], path)
            object.__setattr__(self, item.name, value)  # the dataclass is frozen
            if isinstance(value, str) and has_secret(value):
                raise SimPOError(
                    f"{path} is {value!r}, which holds a token or password; settings are written "
                    "to config.yaml, the adapter and its model card: remove it, and log in with "
                    "`hf auth login` or set HF_TOKEN"
                )
            rule: Rule | None = item.metadata.get("rule")
            if rule is not None and value is not None and not rule.holds(value):
                raise SimPOError(f"{path} is {value!r}; it must be {rule.text}")


class RawText(str):
    """A value from the command line, not parsed yet: the setting's type decides how it is read."""


def from_mapping(cls: type[Section], mapping: Mapping[str, Any], root: type[Section]) -> Any:
    """Build an instance of ``cls`` from nested mappings such as those of a YAML file.

    Args:
        root: the class of the whole configuration, whose names the hints suggest.

    Raises:
        SimPOError: an unknown or missing setting, a wrong type, or a value that breaks its rule.
    """
    hints = typing.get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}
    values = {}
    for name, value in mapping.items():
        path = f"{cls.NAME}.{name}" if cls.NAME else str(name)
        # Never ignored: with a typo in its name, a setting would silently have its default.
        if name not in known:
            hint = nearest_section(path, root) if isinstance(value, Mapping) else ""
            raise SimPOError(f"unknown setting {path!r}{hint or nearest_name(path, root)}")
        hint = hints[name]
        if is_dataclass(hint):
            value = {} if value is None else value  # YAML, when all its lines are commented out
            if not isinstance(value, Mapping):
                raise SimPOError(
                    f"{path} is {value!r}; it must be a section of settings ({path}: …)"
                )
            value = from_mapping(typing.cast(type[Section], hint), value, root)
        values[name] = value
    for name, item in known.items():
        if name not in values and is_required(item):
            path = f"{cls.NAME}.{name}" if cls.NAME else name
            raise SimPOError(f"{path} is missing; set it to the {item.metadata['help']}")
    return cls(**values)


def all_settings(cls: type[Section]) -> Iterator[tuple[str, Field, Any]]:
    """Yield (name with its section, field, type) of every setting under ``cls``, in order."""
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
    """Return a hint at the setting under ``root`` that ``path`` probably means."""
    return hint_at_name(path, [name for name, _, _ in all_settings(root)])


def nearest_section(name: str, root: type[Section]) -> str:
    """Return a hint at the section of ``root`` that ``name`` misspells, or an empty string."""
    return hint_at_section(name, list(_section_names(root)))


def _section_names(cls: type[Section]) -> Iterator[str]:
    """Yield the name of every section under ``cls``, those within sections too."""
    hints = typing.get_type_hints(cls)
    for inner in (hints[item.name] for item in fields(cls) if is_dataclass(hints[item.name])):
        yield inner.NAME
        yield from _section_names(inner)


def coerce(value: Any, hint: Any, path: str) -> Any:
    """Return ``value`` as an instance of the type ``hint``.

    An integer is accepted for a float and a list for a tuple; nothing else is converted.

    Args:
        path: the name of the setting, for the message.

    Raises:
        SimPOError: the value is not of that type.
    """
    options = union_members(hint)
    if isinstance(value, RawText):
        value = parse_raw(value, options, path)
    for option in options:
        if is_of_type(value, option):
            if option is float:
                return float(value)
            return tuple(value) if isinstance(value, list) else value
    expected = " or ".join(describe(option) for option in options)
    raise SimPOError(f"{path} is {value!r}; it must be {expected}")


def is_of_type(value: Any, option: Any) -> bool:
    """Whether ``value`` is accepted for the type ``option``, which is not a union."""
    if option is types.NoneType:
        return value is None
    if typing.get_origin(option) is Literal:
        return value in typing.get_args(option)
    if typing.get_origin(option) is tuple:
        return isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
    if option is float:
        return type(value) in (int, float) and is_finite(value)
    return type(value) is option  # isinstance would accept True for an int


def is_finite(value: int | float) -> bool:
    """Whether a number is neither NaN nor infinite, however large."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an int larger than any float
        return False


def union_members(hint: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the hint itself as the only one."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    return typing.get_args(hint) if is_union else (hint,)


def parse_raw(text: RawText, options: tuple[Any, ...], path: str) -> Any:
    """Parse a command-line value: text for a text setting, YAML for all others (12, 1e-6, [a, b]).

    A model named ``123`` or a revision ``1e5`` must stay text, so the type decides first.
    """
    is_text = all(o in (str, types.NoneType) or typing.get_origin(o) is Literal for o in options)
    if is_text:
        return None if text == "null" and types.NoneType in options else str(text)
    return parse_yaml(text, path)


def describe(option: Any) -> str:
    """Describe a type in the words of a message."""
    # YAML's words for the types, not Python's.
    names = {str: "text", int: "a whole number", float: "a finite number", bool: "true or false"}
    if option is types.NoneType:
        return "null"
    if typing.get_origin(option) is Literal:
        return "one of " + ", ".join(repr(v) for v in typing.get_args(option))
    if typing.get_origin(option) is tuple:
        return "a list of texts"
    return names.get(option, getattr(option, "__name__", str(option)))
