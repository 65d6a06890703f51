"""Settings by their dotted names, as sections in Python and as YAML files."""

import json
import types
import typing
from collections.abc import Callable
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Any, Literal

import pytest

from mlx_simpo import (
    DataConfig,
    EarlyStoppingConfig,
    EngineConfig,
    LogpsConfig,
    LoRAConfig,
    MemoryConfig,
    ObjectiveConfig,
    SimPOConfig,
    SimPOError,
    TrainConfig,
)
from mlx_simpo.config.schema import Section, all_settings
from mlx_simpo.config.sources import NamedSources, Sources, TemplateArguments
from mlx_simpo.config.value_types import union_members

SETTINGS = {name: (item, hint) for name, item, hint in all_settings(SimPOConfig)}
SECTIONS = {"data": DataConfig, "objective": ObjectiveConfig, "lora": LoRAConfig}
SECTIONS |= {"train": TrainConfig, "logps": LogpsConfig}
SECTIONS |= {"engine": EngineConfig, "memory": MemoryConfig}
SECTIONS |= {"train.early_stopping": EarlyStoppingConfig}


# What a setting needs beside it to be valid.
TOGETHER_WITH: dict[str, dict[str, Any]] = {
    "data.valid_main": {"valid": {"x": "pairs.jsonl"}},
    "data.valid_split": {"valid": "pairs"},
}


def section_with(name: str, value: Any) -> Section:
    """The section of ``name`` with this one setting, created in Python."""
    section, _, leaf = name.rpartition(".")
    if not section:
        values: dict[str, Any] = {"model": "x"} | {leaf: value}
        return SimPOConfig(**values)
    return SECTIONS[section](**{leaf: value, **TOGETHER_WITH.get(name, {})})


def write_config(folder: Path, text: str) -> Path:
    """Write config.yaml and return its path."""
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def nested(name: str, value: Any) -> dict[str, Any]:
    """{"lora": {"rank": value}} of "lora.rank"."""
    *sections, leaf = name.split(".")
    result = {leaf: value}
    for section in reversed(sections):
        result = {section: result}
    return result


def in_yaml(name: str, value: Any) -> str:
    """A configuration file with this one setting."""
    return json.dumps({"model": "x"} | nested(name, value))


def error_of(call: Callable[[], Any]) -> str:
    """The message of the SimPOError that a call raises, which is one line."""
    with pytest.raises(SimPOError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


KINDS: dict[Any, str] = {
    str | tuple[str, ...]: "names",
    tuple[str, ...]: "texts",
    dict[str, str]: "texts by name",
    TemplateArguments: "values by name",
    Sources: "sources",
    NamedSources: "sources by name",
}


def kind(hint: Any) -> tuple[str, bool]:
    """(a name such as "int" or "choice", whether null is allowed) of a setting's type."""
    parts = union_members(hint)
    inner = [part for part in parts if part is not types.NoneType]
    union = reduce(or_, inner)
    is_choice = typing.get_origin(union) is Literal
    name = "choice" if is_choice else KINDS.get(union) or union.__name__
    return name, types.NoneType in parts
