"""A run's settings, whole: read, checked and written (see `sections` for each of them).

A configuration comes from a YAML file, ``key=value`` overrides or Python, and is checked the same
way each time (see `strict`). ``configs/`` has one file per published recipe.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import SimPOError
from ..paths import local_path
from .schema import NOT_EMPTY, RawText, Rule, Section, from_mapping, nearest_name, setting
from .sections import DataConfig, LogpsConfig, LoRAConfig, ObjectiveConfig, TrainConfig
from .yaml import dump_yaml, parse_yaml

_SEED = Rule("0 or greater and less than 2**32", lambda v: 0 <= v < 2**32)


@dataclass(frozen=True)
class SimPOConfig(Section):
    """Everything a run depends on."""

    model: str = setting(help="Hugging Face id or local folder of the model", rule=NOT_EMPTY)
    revision: str | None = setting(None, "branch, tag or commit of a Hub model")
    trust_remote_code: bool = setting(False, "run code that comes with the model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "of the frozen weights; auto: as stored (LoRA weights are always float32)"
    )
    output: str = setting(
        "runs/simpo", "new folder for the adapter and the run's record", NOT_EMPTY
    )
    seed: int = setting(42, "of initial weights, data order, dropout and split", _SEED)
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    lora: LoRAConfig = LoRAConfig()
    train: TrainConfig = TrainConfig()
    logps: LogpsConfig = LogpsConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.logps.impl != "auto" and self.train.engine == "reference":
            raise SimPOError(
                f"logps.impl is {self.logps.impl}, but train.engine=reference has one way to make "
                "log-probabilities; leave one of the two out"
            )

    def as_dict(self) -> dict[str, Any]:
        """The whole configuration as plain values, for YAML and JSON."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {k: plain(v) for k, v in value.items()}
            return list(value) if isinstance(value, tuple) else value

        return plain(asdict(self))

    def to_yaml(self) -> str:
        """The whole configuration as YAML that `load_config` reads back to an equal one."""
        return dump_yaml(self.as_dict())


def load_config(path: str | Path | None = None, overrides: Iterable[str] = ()) -> SimPOConfig:
    """A configuration from a YAML file and ``key=value`` overrides such as ``lora.rank=16``.

    Raises:
        SimPOError: an unreadable file, an unknown setting, a wrong type, an impossible value.
    """
    given: Any = {}
    if path is not None:
        try:
            text = local_path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, SimPOError) as error:
            raise SimPOError(f"cannot read the configuration {str(path)!r}: {error}") from None
        given = parse_yaml(text, str(path))
        given = {} if given is None else given
        if not isinstance(given, dict):
            raise SimPOError(f"{path} must hold settings (name: value), not {given!r}")
    for override in overrides:
        apply_override(given, override)
    return from_mapping(SimPOConfig, given, SimPOConfig)


def apply_override(given: dict, override: str) -> None:
    """Put one ``section.name=value`` into the nested mapping ``given``."""
    key, equals, value = override.partition("=")
    if not equals:
        hint = nearest_name(key, SimPOConfig)
        raise SimPOError(f"{override!r} is not a setting of the form name=value{hint}")
    *sections, name = key.split(".")
    for section in sections:
        if given.get(section) is None:
            given[section] = {}
        given = given[section]
        if not isinstance(given, dict):
            raise SimPOError(f"unknown setting {key!r}{nearest_name(key, SimPOConfig)}")
    group = given.get(name)
    if group and isinstance(group, dict):
        raise SimPOError(
            f"{key} is {value!r}, but {key}.{next(iter(group))} is given as well; leave one out"
        )
    given[name] = RawText(value)
