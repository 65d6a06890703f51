"""Settings by their dotted names, as sections in Python and as YAML files."""

import json
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest

from mlx_simpo import (
    DataConfig,
    EarlyStoppingConfig,
    LogpsConfig,
    LoRAConfig,
    ObjectiveConfig,
    SimPOConfig,
    SimPOError,
    TrainConfig,
)
from mlx_simpo.config.schema import Section, all_settings

SETTINGS = {name: (item, hint) for name, item, hint in all_settings(SimPOConfig)}
SECTIONS = {"data": DataConfig, "objective": ObjectiveConfig, "lora": LoRAConfig}
SECTIONS |= {"train": TrainConfig, "logps": LogpsConfig}
SECTIONS |= {"train.early_stopping": EarlyStoppingConfig}


def section_with(name: str, value: Any) -> Section:
    """The section of ``name`` with this one setting, created in Python."""
    section, _, leaf = name.rpartition(".")
    if not section:
        values: dict[str, Any] = {"model": "x"} | {leaf: value}
        return SimPOConfig(**values)
    return SECTIONS[section](**{leaf: value})


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


def kind(hint: Any) -> tuple[str, bool]:
    """(a name such as "int" or "choice", whether null is allowed) of a setting's type."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if len(parts) == 1 and typing.get_origin(hint) is typing.Union:
        parts = typing.get_args(hint)
    inner = [p for p in typing.get_args(hint) or parts if p is not types.NoneType]
    if typing.get_origin(hint) is Literal:
        inner = [hint]
    first: Any = inner[0]
    name = "choice" if typing.get_origin(first) is Literal else first.__name__
    return ("names" if len(inner) > 1 else name), types.NoneType in typing.get_args(hint)
