"""PEFT's adapter_config.json: what is read of it, what is refused, and how its patterns match."""

import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import SimPOError
from ...files import PICKLES, read_json
from ...model.adapters import CONFIG, MAX_RANK, MAX_SCALE, PEFT_WEIGHTS, is_valid_scale

# Settings that change what the tensors mean, beside those of LoRA, DoRA and rsLoRA; PEFT's default
# of each is what makes no difference. A setting that PEFT gets after 0.21 is refused if it is on.
_UNDERSTOOD = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "use_dora",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "target_parameters",
    "init_lora_weights",
    "bias",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "runtime_config",
}
# These start from a changed base model; the adapter alone does not say which.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_WHY = {
    "modules_to_save": "whole layers are trained beside the adapter; merge it into the model",
    "lora_bias": "biases are trained, which mlx-lm's LoRA has not",
    "trainable_token_indices": "single tokens are trained, which mlx-lm has not",
    "layer_replication": "layers are repeated, which mlx-lm has not",
    "fan_in_fan_out": "the weights are transposed",
}


# What can make a match take for ever: a repetition of a group, or many repetitions (PEFT's own
# frame around a pattern has up to two).
_MAX_PATTERN, _MAX_REPEATED = 1000, 7
_REPEATED, _OF_GROUP = re.compile(r"[*+}]"), re.compile(r"\)[*+{]")


@dataclass(frozen=True)
class PeftConfig:
    """The part of a PEFT configuration that says what its tensors mean."""

    content: dict[str, Any]
    where: str

    def scale(self, path: str) -> tuple[int, float]:
        """(rank, factor of B·A) of the layer or parameter at this path."""
        rank = self.first_match("rank_pattern", path, self.content.get("r"))
        alpha = self.first_match("alpha_pattern", path, self.content.get("lora_alpha"))
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            raise self.refusal(f"rank {str(rank)[:40]} of {path}; it must be 1 to {MAX_RANK}")
        if not is_valid_scale(alpha):
            raise self.refusal(
                f"lora_alpha {str(alpha)[:40]} of {path}; it must be a finite number of at most "
                f"{MAX_SCALE:g}"
            )
        return rank, alpha / (math.sqrt(rank) if self.content.get("use_rslora") else rank)

    def first_match(self, name: str, path: str, default: Any) -> Any:
        """The value of the first pattern that the end of ``path`` matches, as in PEFT."""
        for pattern, value in (self.content.get(name) or {}).items():
            if self.match(rf"(.*\.)?({pattern})$", path):
                return value
        return default

    def match(self, pattern: str, text: str, *, whole: bool = False) -> re.Match[str] | None:
        """`re.match`, or `re.fullmatch`, with an error that names the file.

        Patterns come from elsewhere: those that could try for ever are refused.
        """
        repeated = len(_REPEATED.findall(pattern))
        if len(pattern) > _MAX_PATTERN or repeated > _MAX_REPEATED or _OF_GROUP.search(pattern):
            raise self.refusal(
                f"the pattern {pattern[:80]!r} is too long or repeats too much to be tried; list "
                "the modules by name"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of how later versions of Python will read it
                return (re.fullmatch if whole else re.match)(pattern, text)
        except (re.error, OverflowError, RecursionError) as error:
            raise self.refusal(f"the pattern {pattern[:80]!r}: {error}") from None

    def targeted(self, modules: Iterable[str], linear: set[str], head: str | None) -> set[str]:
        """Those of these module paths that target_modules names.

        Args:
            linear: the linear layers among them. head: the output layer, which all-linear omits.
        """
        wanted = self.content.get("target_modules")
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            return {path for path in modules if path in linear and path != head}
        return {path for path in modules if self.names(path) and not self.excluded(path)}

    def names(self, path: str) -> bool:
        """Whether target_modules and layers_to_transform name this module."""
        wanted = self.content.get("target_modules")
        if isinstance(wanted, str):
            return self.match(wanted, path, whole=True) is not None
        if path in (wanted or []):
            return True
        if not ends_in(path, wanted):
            return False
        layers = self.content.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.content.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            found = self.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", path)
            if found:
                index = int(found[found.lastindex or 1])
                return index == layers if isinstance(layers, int) else index in layers
        return False

    def leaves_out(self, module: str) -> bool:
        """Whether PEFT would pass over the tensors of this module, which target_modules or the
        settings beside it do not name."""
        wanted = self.content.get("target_modules")
        if wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear"):
            return False
        return not self.names(module) or self.excluded(module)

    def excluded(self, path: str) -> bool:
        """Whether exclude_modules names this module."""
        excluded = self.content.get("exclude_modules")
        if isinstance(excluded, str):
            return self.match(excluded, path, whole=True) is not None
        return path in (excluded or []) or ends_in(path, excluded)

    def parameter(self, path: str) -> bool:
        """Whether target_parameters names this parameter."""
        wanted = self.content.get("target_parameters")
        return path in (wanted or []) or ends_in(path, wanted)

    def refusal(self, reason: str) -> SimPOError:
        """An error about this file."""
        return SimPOError(f"{self.where}: {reason}")


def ends_in(path: str, names: Iterable[str] | None) -> bool:
    """Whether a path ends in one of these names, as a whole part of it."""
    return any(path.endswith(f".{name}") for name in names or [])


def read_peft_config(folder: Path) -> PeftConfig:
    """The configuration of a PEFT LoRA adapter.

    Raises:
        SimPOError: no PEFT adapter, pickled weights, or a setting that mlx-lm's LoRA cannot hold;
            all such settings in one message.
    """
    content = read_json(folder / CONFIG)
    where = f"{folder}/{CONFIG}"
    if "peft_type" not in content:
        raise SimPOError(f"{where} has no peft_type; is it a PEFT adapter?")
    if not (folder / PEFT_WEIGHTS).is_file():
        pickled = next((p.name for p in folder.glob("*") if p.suffix.lower() in PICKLES), None)
        raise SimPOError(
            f"{folder} holds no {PEFT_WEIGHTS}"
            + (
                f", only {pickled}, a pickle, which can run any code and is never loaded; save the "
                "adapter as safetensors where you trust it"
                if pickled
                else ""
            )
        )
    problems = [reason for reason in refused(content) if reason]
    if problems:
        raise SimPOError(
            f"{where}: {'; '.join(problems)}. Merge the adapter into its model with PEFT "
            "(merge_and_unload) and convert that: mlx-simpo convert from-hf"
        )
    check_types(content, where)
    return PeftConfig(content, where)


def refused(content: dict[str, Any]) -> Iterable[str]:
    """Why this adapter cannot be held by mlx-lm's LoRA: a reason a setting."""
    if content["peft_type"] != "LORA":
        yield f"peft_type is {str(content['peft_type'])[:40]}, only LORA is converted"
    if content.get("bias", "none") != "none":
        yield f"bias is {str(content['bias'])[:40]}, only none is converted"
    start = content.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGE_BASE):
        yield f"init_lora_weights is {start[:40]}, which changes the base model"
    for name, value in content.items():
        if name not in _UNDERSTOOD and value:
            yield f"{name[:60]} is set: {_WHY.get(name, 'it is not known what that means')}"


def check_types(content: dict[str, Any], where: str) -> None:
    """SimPOError if a setting that is read is of another type than PEFT's."""
    text, names, table = str, list, dict
    types: dict[str, tuple[type, ...]] = {
        "target_modules": (text, names),
        "exclude_modules": (text, names),
        "target_parameters": (names,),
        "layers_to_transform": (int, names),
        "layers_pattern": (text, names),
        "rank_pattern": (table,),
        "alpha_pattern": (table,),
        "use_rslora": (bool,),
        "use_dora": (bool,),
        "base_model_name_or_path": (text,),
        "revision": (text,),
    }
    for name, allowed in types.items():
        value = content.get(name)
        inner = int if name == "layers_to_transform" else str
        good = value is None or isinstance(value, allowed)
        if good and isinstance(value, list):
            good = all(type(v) is inner for v in value)
        if not good:
            kinds = " or ".join(kind.__name__ for kind in allowed)
            raise SimPOError(f"{where}: {name} is {str(value)[:40]}; it must be a {kinds}")
