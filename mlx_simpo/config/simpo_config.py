"""The whole configuration of a run: read, checked and written (`sections` declares the settings).

A configuration comes from a YAML file, ``name=value`` overrides or Python, and is checked the same
way each time (see `schema`). ``configs/`` has one file per published recipe.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from ..errors import InvalidSettingsError, SimPOError, messages_of
from ..paths import local_path
from .data_config import DataConfig
from .hints import hint_at_name
from .schema import NON_EMPTY, Rule, Section, from_mapping, setting, setting_names
from .sections import EngineConfig, LogpsConfig, LoRAConfig, MemoryConfig, ObjectiveConfig
from .sources import SourceConfig
from .train_config import TrainConfig
from .value_types import RawText
from .yaml import dump_yaml, key_lines, parse_yaml

_SEED = Rule("0 or greater and less than 2**32", lambda v: 0 <= v < 2**32)


@dataclass(frozen=True)
class SimPOConfig(Section):
    """All settings of a run."""

    # A resumed run compares the model's content.
    model: str = setting(
        help="Hugging Face id or local folder of the model", rule=NON_EMPTY, on_resume="free"
    )
    revision: str | None = setting(None, "branch, tag or commit of a Hub model", on_resume="free")
    trust_remote_code: bool = setting(False, "run code that comes with the model", on_resume="free")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto",
        "dtype of the frozen weights: float32, bfloat16, float16, or auto (as stored); LoRA "
        "weights are always float32",
    )
    output: str = setting(
        "runs/simpo",
        "new folder for the adapter, the metrics and the configuration",
        NON_EMPTY,
        "free",
    )
    seed: int = setting(
        42, "seed of the initial LoRA weights, data order, dropout and validation split", _SEED
    )
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoRAConfig = LoRAConfig()
    train: TrainConfig = TrainConfig()
    logps: LogpsConfig = LogpsConfig()
    engine: EngineConfig = EngineConfig()
    memory: MemoryConfig = MemoryConfig()

    def conflicts(self) -> Iterator[str]:
        """Yield a message for all settings that exclude each other."""
        if self.logps.impl != "auto" and self.train.engine == "reference":
            yield (
                f"logps.impl is {self.logps.impl}, but train.engine=reference has only one "
                "implementation; remove one of the two settings"
            )
        if self.engine.attention != "auto" and self.train.engine == "reference":
            yield (
                f"engine.attention is {self.engine.attention}, but train.engine=reference computes "
                "attention as mlx-lm does; remove one of the two settings"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the configuration as nested dicts of plain values, for YAML and JSON.

        A source has only those of its settings that are not the default.
        """

        def plain(value: Any) -> Any:
            if isinstance(value, Section):
                short = isinstance(value, SourceConfig)
                values = {item: getattr(value, item.name) for item in fields(value)}
                return {i.name: plain(v) for i, v in values.items() if not short or v != i.default}
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return [plain(v) for v in value] if isinstance(value, list | tuple) else value

        return plain(self)

    def to_yaml(self) -> str:
        """Return the configuration as YAML that `load_config` reads back as an equal one."""
        return dump_yaml(self.as_dict())


def load_config(
    settings: str | Path | Mapping[str, Any] | None = None, overrides: Iterable[str] = ()
) -> SimPOConfig:
    """Load a configuration from a YAML file or a mapping, and ``name=value`` overrides.

    >>> load_config({"model": "mlx-community/Qwen2.5-1.5B-Instruct-4bit", "lora": {"rank": 8}})

    Overrides such as ``lora.rank=16`` win over the file, later ones over earlier ones.

    Args:
        settings: the path of a YAML file, or what such a file holds: {"lora": {"rank": 16}}.

    Raises:
        SimPOError: an unreadable file.
        InvalidSettingsError: unknown or missing settings, wrong types, or values that break their
            rule; it tells all of them.
    """
    values = _copy(settings) if isinstance(settings, Mapping) else read_file(settings)
    mistakes, earlier = [], []
    for override in overrides:
        try:
            earlier.append(_apply_override(values, override, earlier))
        except SimPOError as error:
            mistakes += messages_of(error)
    try:
        config = from_mapping(SimPOConfig, values, SimPOConfig)
    except SimPOError as error:
        raise InvalidSettingsError([*mistakes, *messages_of(error)]) from None
    if mistakes:
        raise InvalidSettingsError(mistakes)
    return config


def _copy(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of nested mappings, which overrides can change."""
    return {k: _copy(v) if isinstance(v, Mapping) else v for k, v in settings.items()}


def read_file(path: str | Path | None) -> dict[str, Any]:
    """Return what a configuration file holds, unchecked; {} without one.

    Raises:
        SimPOError: it cannot be read, is not valid YAML, or holds something else than settings.
    """
    if path is None:
        return {}
    values = parse_yaml(_read_text(path), str(path))
    values = {} if values is None else values  # an empty file
    if not isinstance(values, dict):
        raise SimPOError(f"{path} must contain settings (name: value), not {values!r}")
    return values


def read_lines(path: str | Path | None) -> dict[str, int]:
    """Return the line of each setting in a configuration file, and of each part of its value.

    Raises:
        SimPOError: the file cannot be read.
    """
    return {} if path is None else key_lines(_read_text(path))


def _read_text(path: str | Path) -> str:
    """Return the text of a configuration file; SimPOError if it cannot be read."""
    try:
        return local_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, SimPOError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SimPOError(f"cannot read the configuration {str(path)!r}: {reason}") from None


def _apply_override(values: dict, override: str, earlier: Sequence[str]) -> str:
    """Write one ``section.name=value`` into the nested dicts ``values``, in place.

    Args:
        earlier: the names that other overrides have set.

    Returns:
        The setting's name.

    Raises:
        SimPOError: it has no ``=``, its section does not exist, or another override sets a part of
            its value.
    """
    key, equals, value = override.partition("=")
    if not equals:
        hint = hint_at_name(key, setting_names(SimPOConfig))
        raise SimPOError(f"{override!r} is not a setting of the form name=value{hint}")
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, 1):
        if values.get(section) in (None, "null"):  # absent, or all its lines are commented out
            values[section] = {}
        if not isinstance(values[section], dict):
            whole = ".".join(sections[:depth])
            if whole in setting_names(SimPOConfig):
                value = values[section]
                raise SimPOError(f"{whole} is {value!r}, but {key} is set, too; remove one of them")
            raise SimPOError(
                f"unknown setting {key!r}{hint_at_name(key, setting_names(SimPOConfig))}"
            )
        values = values[section]
    values[name] = RawText(value)
    if part := next((other for other in earlier if other.startswith(f"{key}.")), None):
        raise SimPOError(f"{key} is {value!r}, but {part} is set, too; remove one of them")
    return key


def resume_config(run: str | Path, overrides: Iterable[str] = ()) -> SimPOConfig:
    """Return the configuration of the run in a folder, to continue it with `api.train`.

    Args:
        run: the run's output folder, wherever it is now. overrides: settings that change, as
            ``name=value``; docs/long_runs.md lists those that may.

    Raises:
        SimPOError: the folder holds no run, or a setting is wrong.
    """
    path = local_path(run) / "config.yaml"
    if not path.is_file():
        raise SimPOError(
            f"{run} holds no run that could be resumed (it has no config.yaml); name the output "
            "folder of a run"
        )
    config = load_config(path, [f"output={run}", *overrides])
    if config.output != str(run):
        raise SimPOError(
            f"output is {config.output!r}, but a run goes on in its own folder, {run}; leave "
            "output=… away (the folder may be moved before)"
        )
    return config
