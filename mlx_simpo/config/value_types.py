"""The types that settings have: which values fit, how text is read, what messages call them."""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal

from ..errors import SimPOError
from .yaml import parse_yaml


class RawText(str):
    """A value from the command line, not parsed yet: the setting's type decides how it is read."""


def plain_value(value: Any) -> Any:
    """Return what text from the command line stands for where no type says how it is read.

    That is YAML, and Python's True, False and None; "-", which is standard input, and other values
    stay as they are.
    """
    if not isinstance(value, RawText):
        return value
    if value == "-":  # to YAML a list with nothing in it
        return str(value)
    text = {"True": "true", "False": "false", "None": "null"}.get(value, str(value))
    try:
        return parse_yaml(text, "value")
    except SimPOError:
        return str(value)


def is_required(item: Field) -> bool:
    """Whether a setting has no default."""
    return item.default is MISSING and item.default_factory is MISSING


def required_name(cls: Any) -> str | None:
    """Return the name of the first setting of a section that has no default, if there is one.

    Text stands for a section that has one: a source is written as its path.
    """
    return next((item.name for item in fields(cls) if is_required(item)), None)


def is_of_type(value: Any, option: Any) -> bool:
    """Whether ``value`` is accepted for the type ``option``, which is not a union."""
    if option is Any:
        return True
    if option is types.NoneType:
        return value is None
    container = typing.get_origin(option)
    if container is Literal:
        return value in typing.get_args(option)
    if container is tuple:
        item_type = typing.get_args(option)[0]
        return isinstance(value, list | tuple) and all(is_item(v, item_type) for v in value)
    if container is dict:
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if is_dataclass(option):
        # Without its required setting, a mapping may be one of sections by name.
        is_mapping = isinstance(value, Mapping) and required_name(option) in value
        return is_mapping or isinstance(value, typing.cast(type, option))
    if option is float:
        return type(value) in (int, float) and is_finite(value)
    return type(value) is option  # isinstance would accept True for an int


def is_item(value: Any, option: Any) -> bool:
    """Whether ``value`` is accepted in a list or mapping of ``option``; for a section also its
    required setting alone, and any mapping, whose mistakes are told one by one."""
    if is_dataclass(option):
        return isinstance(value, str | Mapping | typing.cast(type, option))
    return is_of_type(value, option)


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
    is_text = [o is str or typing.get_origin(o) is Literal for o in options]
    is_null = [o is types.NoneType for o in options]
    only_text = all(a or b for a, b in zip(is_text, is_null, strict=True))
    may_be_text = any(is_text) or any(is_dataclass(option) for option in options)
    if only_text or (may_be_text and text[:1] not in ("[", "{")):
        return None if text == "null" and any(is_null) else str(text)
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
        items = typing.get_args(option)[0]
        return "a list of texts" if items is str else f"a list of {describe(items)}"
    if typing.get_origin(option) is dict:
        return "names with their values ({name: value})"
    if is_dataclass(option) and (required := required_name(option)):
        return f"settings with their values ({{{required}: …}})"
    return names.get(option, getattr(option, "__name__", str(option)))
