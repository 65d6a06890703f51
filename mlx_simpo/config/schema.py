"""Strict reading of settings into frozen dataclasses.

An unknown name, a wrong type or an invalid value is an error that names the setting, the value, the
rule and, for an unknown name, the nearest one that exists.

A settings class derives from `Section` and declares each field with `setting(default, help, rule)`.
A default, a help text and a rule are written there and nowhere else: YAML files, ``name=value``
overrides and Python keyword arguments all go through the same checks.
"""

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from ..errors import InvalidSettingsError, SimPOError, has_secret, messages_of
from .aliases import as_words, as_yaml, meaning
from .hints import hint_at_section, hint_at_setting
from .value_types import (
    RawText,
    describe,
    is_item,
    is_of_type,
    is_required,
    parse_raw,
    required_name,
    union_members,
)


class Rule(NamedTuple):
    """What a value must satisfy: in words, for messages, and as a predicate."""

    text: str
    holds: Callable[[Any], bool]


POSITIVE = Rule("greater than 0", lambda v: v > 0)
NON_NEGATIVE = Rule("0 or greater", lambda v: v >= 0)
FRACTION = Rule("at least 0 and less than 1", lambda v: 0 <= v < 1)
SHARE = Rule("between 0 and 1", lambda v: 0 <= v <= 1)
NON_EMPTY = Rule("not empty", lambda v: not isinstance(v, Sized) or len(v) > 0)


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
        """Convert and check every field, and then the fields against each other.

        Raises:
            InvalidSettingsError: values of a wrong type, that break their rule or hold a token; or
                settings that exclude each other. It tells all of them.
        """
        hints, mistakes = typing.get_type_hints(type(self)), []
        for item in fields(self):
            path = join(self.NAME, item.name)
            try:
                value = checked(getattr(self, item.name), item, hints[item.name], path)
            except SimPOError as error:
                mistakes += messages_of(error)
            else:
                object.__setattr__(self, item.name, value)  # the dataclass is frozen
        if mistakes := mistakes or list(self.conflicts()):
            raise InvalidSettingsError(mistakes)

    def conflicts(self) -> Iterator[str]:
        """Yield a message for all settings that exclude each other; a subclass has its own."""
        return iter(())


def from_mapping(
    cls: type[Section], mapping: Mapping[str, Any], root: type[Section], where: str | None = None
) -> Any:
    """Build an instance of ``cls`` from nested mappings such as those of a YAML file.

    Args:
        root: the class of the whole configuration, whose names the hints suggest.
        where: what the names of the settings begin with in messages; default: ``cls.NAME``.

    Raises:
        InvalidSettingsError: unknown or missing settings, wrong types, or values that break their
            rule. It tells all of them.
    """
    prefix = cls.NAME if where is None else where
    hints = typing.get_type_hints(cls)
    known = {item.name: item for item in fields(cls)}
    values, mistakes = {}, []
    for name, value in mapping.items():
        path = join(prefix, name)
        # Never ignored: with a typo in its name, a setting would silently have its default.
        if name not in known:
            names = setting_names(root) if where is None else [join(where, n) for n in known]
            mistakes.append(
                _unknown(
                    path, value, mapping, names, [section.NAME for section in section_classes(root)]
                )
            )
            continue
        try:
            if is_dataclass(hints[name]):
                values[name] = _read_section(value, hints[name], root, path)
            else:
                values[name] = checked(value, known[name], hints[name], path)
        except SimPOError as error:
            mistakes += messages_of(error)
    mistakes += [
        f"{join(prefix, name)} is missing; set it to the {item.metadata['help']}"
        for name, item in known.items()
        if name not in mapping and is_required(item)
    ]
    if mistakes:
        raise InvalidSettingsError(mistakes)
    return cls(**values)


def _unknown(
    path: str, value: Any, others: Mapping, names: Sequence[str], sections: Sequence[str]
) -> str:
    """Return the message for a setting that does not exist, with a hint at what it may mean."""
    hint = hint_at_section(path, sections) if isinstance(value, Mapping) else ""
    return f"unknown setting {path!r}{hint or hint_at_setting(path, names, value, others)}"


def _read_section(value: Any, cls: Any, root: type[Section], path: str) -> Any:
    """Return a section of settings; InvalidSettingsError if ``value`` is none."""
    value = {} if value is None else value  # YAML, when all its lines are commented out
    if not isinstance(value, Mapping):
        here = meaning(path, value, {})
        way = as_words if isinstance(value, RawText) else as_yaml
        hint = f"; {way(here)}" if here else ""
        message = f"{path} is {value!r}; it must be a section of settings ({path}: …)"
        raise SimPOError(f"{message}{hint}")
    return from_mapping(cls, value, root)


def join(prefix: str, name: object) -> str:
    """Return the name of a setting with its section's name before it, if there is one."""
    return f"{prefix}.{name}" if prefix else str(name)


def all_settings(cls: type[Section]) -> Iterator[tuple[str, Field, Any]]:
    """Yield (name with its section, field, type) of every setting under ``cls``, in order."""
    hints = typing.get_type_hints(cls)
    for item in fields(cls):
        hint = hints[item.name]
        if is_dataclass(hint):
            yield from all_settings(typing.cast(type[Section], hint))
        else:
            yield join(cls.NAME, item.name), item, hint


def setting_names(cls: type[Section]) -> list[str]:
    """Return the names of all settings under ``cls``, in order."""
    return [name for name, _, _ in all_settings(cls)]


def section_classes(cls: type[Section]) -> Iterator[type[Section]]:
    """Yield every section under ``cls``, those within sections too."""
    hints = typing.get_type_hints(cls)
    for inner in (hints[item.name] for item in fields(cls) if is_dataclass(hints[item.name])):
        yield inner
        yield from section_classes(inner)


def checked(value: Any, item: Field, hint: Any, path: str) -> Any:
    """Return a value as its field's type, after checking its rule.

    Args:
        path: the name of the setting, for messages.

    Raises:
        SimPOError: a wrong type, a broken rule, or a token in the value.
    """
    value = coerce(value, hint, path)
    shown = list(value) if isinstance(value, tuple) else value
    if has_secret(str(value)):
        raise SimPOError(
            f"{path} is {shown!r}, which holds a token or password; settings are written "
            "to config.yaml, the adapter and its model card: remove it, and log in with "
            "`hf auth login` or set HF_TOKEN"
        )
    rule: Rule | None = item.metadata.get("rule")
    if rule is not None and value is not None and not rule.holds(value):
        raise SimPOError(f"{path} is {shown!r}; it must be {rule.text}")
    return value


def coerce(value: Any, hint: Any, path: str) -> Any:
    """Return ``value`` as an instance of the type ``hint``.

    An integer is accepted for a float, a list for a tuple, and for a `Section` a mapping, or the
    value of its one required setting. Nothing else is converted.

    Args:
        path: the name of the setting, for messages.

    Raises:
        SimPOError: the value is not of that type.
    """
    options = union_members(hint)
    if isinstance(value, RawText):
        value = parse_raw(value, options, path)
    for option in options:
        if is_of_type(value, option):
            return convert(value, option, path)
    expected = " or ".join(describe(option) for option in options)
    raise SimPOError(f"{path} is {value!r}; it must be {expected}")


def convert(value: Any, option: Any, path: str) -> Any:
    """Return a value that `is_of_type` or `is_item` accepts as an instance of the type.

    Raises:
        InvalidSettingsError: items of a list or mapping do not fit. It tells all of them.
    """
    if option is float:
        return float(value)
    if is_dataclass(option) and not isinstance(value, typing.cast(type, option)):
        cls = typing.cast(type[Section], option)
        mapping = value if isinstance(value, Mapping) else {required_name(cls): value}
        return from_mapping(cls, mapping, cls, where=path)
    container = typing.get_origin(option)
    if container is tuple:
        item_type = typing.get_args(option)[0]
        return tuple(_convert_items({f"{path}[{i}]": v for i, v in enumerate(value)}, item_type))
    if container is dict:
        item_type = typing.get_args(option)[1]
        items = _convert_items({f"{path}.{key}": v for key, v in value.items()}, item_type)
        return dict(zip(value, items, strict=True))
    return value


def _convert_items(items: Mapping[str, Any], item_type: Any) -> list[Any]:
    """Return items, by their paths, as ``item_type``; InvalidSettingsError if some do not fit."""
    results, mistakes = [], []
    for path, item in items.items():
        try:
            item = parse_raw(item, (item_type,), path) if isinstance(item, RawText) else item
            as_item = is_dataclass(item_type) and is_item(item, item_type)
            results.append((convert if as_item else coerce)(item, item_type, path))
        except SimPOError as error:
            mistakes += messages_of(error)
    if mistakes:
        raise InvalidSettingsError(mistakes)
    return results
