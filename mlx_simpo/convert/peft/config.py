"""PEFT's adapter_config.json: its settings, its patterns, and what mlx-lm does not support."""

import math
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import SimPOError
from ...files import PICKLES, read_json
from ...model.adapters import CONFIG, MAX_RANK, MAX_SCALE, PEFT_WEIGHTS, is_valid_scale

# Settings of PEFT 0.21 that are read, or that do not change what the tensors mean. Any other one is
# an error if it is on: one that a later version adds could change their meaning.
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
# Initializations that change the base model; the adapter alone does not tell how.
_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_WHY_UNSUPPORTED = {
    "modules_to_save": "whole layers are trained beside the adapter; merge it into the model",
    "lora_bias": "biases are trained, which mlx-lm's LoRA does not support",
    "trainable_token_indices": "single tokens are trained, which mlx-lm does not support",
    "layer_replication": "layers are repeated, which mlx-lm does not support",
    "fan_in_fan_out": "the weights are transposed",
}

# A match can take forever with a repetition of a group, or with many repetitions. PEFT's own frame
# around a pattern has up to two of these.
_MAX_PATTERN, _MAX_REPETITIONS = 1000, 7
_REPETITION, _REPEATED_GROUP = re.compile(r"[*+}]"), re.compile(r"\)[*+{]")


@dataclass(frozen=True)
class PeftConfig:
    """The settings of a PEFT adapter that say what its tensors mean.

    content: of the JSON file. path: of the file, for messages.
    """

    content: dict[str, Any]
    path: str

    def scale(self, module: str) -> tuple[int, float]:
        """Return (rank, scale) of the layer or parameter at this path; the delta is scale · B·A.

        The scale is lora_alpha / rank, or lora_alpha / √rank with rsLoRA
        (https://arxiv.org/abs/2312.03732).

        Raises:
            SimPOError: rank or lora_alpha is not a valid number.
        """
        rank = self.first_match("rank_pattern", module, self.content.get("r"))
        alpha = self.first_match("alpha_pattern", module, self.content.get("lora_alpha"))
        # Not isinstance: True is an int.
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            raise self.error(f"rank {str(rank)[:40]} of {module}; it must be 1 to {MAX_RANK}")
        if not is_valid_scale(alpha):
            raise self.error(
                f"lora_alpha {str(alpha)[:40]} of {module}; it must be a finite number of at most "
                f"{MAX_SCALE:g}"
            )
        return rank, alpha / (math.sqrt(rank) if self.content.get("use_rslora") else rank)

    def first_match(self, setting: str, module: str, default: Any) -> Any:
        """Return the value of the first pattern that matches the end of a path, as PEFT does.

        Args:
            setting: rank_pattern or alpha_pattern.
        """
        for pattern, value in (self.content.get(setting) or {}).items():
            if self.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default

    def match(self, pattern: str, text: str, *, whole: bool = False) -> re.Match[str] | None:
        """Call `re.match`, or `re.fullmatch` if ``whole``, on a pattern that is not trusted.

        Raises:
            SimPOError: the pattern is not valid, or could take forever.
        """
        repetitions = len(_REPETITION.findall(pattern))
        if (
            len(pattern) > _MAX_PATTERN
            or repetitions > _MAX_REPETITIONS
            or _REPEATED_GROUP.search(pattern)
        ):
            raise self.error(
                f"the pattern {pattern[:80]!r} is too long or repeats too much to be tried; list "
                "the modules by name"
            )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about what later versions of Python will change
                return (re.fullmatch if whole else re.match)(pattern, text)
        except (re.error, OverflowError, RecursionError) as error:
            raise self.error(f"the pattern {pattern[:80]!r} is not valid: {error}") from None

    def targeted(self, modules: Iterable[str], linear: set[str], head: str | None) -> set[str]:
        """Return those of these module paths that target_modules names and no setting excludes.

        Args:
            linear: the linear layers among them.
            head: the output layer, which all-linear omits.
        """
        targets = self.content.get("target_modules")
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return {path for path in modules if path in linear and path != head}
        return {path for path in modules if self.is_named(path) and not self.is_excluded(path)}

    def is_named(self, module: str) -> bool:
        """Whether target_modules and layers_to_transform name this module, as PEFT reads them."""
        targets = self.content.get("target_modules")
        if isinstance(targets, str):
            return self.match(targets, module, whole=True) is not None
        # PEFT looks at layers_to_transform only for names that are not the whole path.
        if module in (targets or []):
            return True
        if not ends_in(module, targets):
            return False
        layers = self.content.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.content.get("layers_pattern") or [r"[^.]*"]
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if match := self.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module):
                # The last group: the pattern may have groups of its own.
                index = int(match.groups()[-1])
                return index == layers if isinstance(layers, int) else index in layers
        return False

    def is_ignored(self, module: str) -> bool:
        """Whether PEFT would ignore the tensors of this module, because no setting names it."""
        targets = self.content.get("target_modules")
        if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
            return False
        return not self.is_named(module) or self.is_excluded(module)

    def is_excluded(self, module: str) -> bool:
        """Whether exclude_modules names this module."""
        excluded = self.content.get("exclude_modules")
        if isinstance(excluded, str):
            return self.match(excluded, module, whole=True) is not None
        return module in (excluded or []) or ends_in(module, excluded)

    def is_target_parameter(self, path: str) -> bool:
        """Whether target_parameters names this parameter."""
        targets = self.content.get("target_parameters")
        return path in (targets or []) or ends_in(path, targets)

    def error(self, reason: str) -> SimPOError:
        """Return an error that names this file."""
        return SimPOError(f"{self.path}: {reason}")


def ends_in(path: str, names: Iterable[str] | None) -> bool:
    """Whether a path ends in one of these names, as whole parts of it."""
    return any(path.endswith(f".{name}") for name in names or [])


def read_peft_config(folder: Path) -> PeftConfig:
    """Read the configuration of a PEFT LoRA adapter.

    Raises:
        SimPOError: the folder holds no PEFT adapter or only pickled weights, or the adapter has
            settings that mlx-lm's LoRA does not support; all of these in one message.
    """
    content = read_json(folder / CONFIG)
    path = f"{folder}/{CONFIG}"
    if "peft_type" not in content:
        raise SimPOError(f"{path} has no peft_type; is it a PEFT adapter?")
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
    if reasons := list(unsupported_settings(content)):
        raise SimPOError(
            f"{path}: {'; '.join(reasons)}. Merge the adapter into its model with PEFT "
            "(merge_and_unload) and convert that: mlx-simpo convert from-hf"
        )
    check_types(content, path)
    return PeftConfig(content, path)


def unsupported_settings(content: dict[str, Any]) -> Iterator[str]:
    """Yield why mlx-lm's LoRA cannot represent this adapter, one reason per setting."""
    if content["peft_type"] != "LORA":
        yield f"peft_type is {str(content['peft_type'])[:40]}, only LORA is converted"
    if content.get("bias", "none") != "none":
        yield f"bias is {str(content['bias'])[:40]}, only none is converted"
    initialization = content.get("init_lora_weights")
    if isinstance(initialization, str) and initialization.lower().startswith(_CHANGE_BASE):
        yield f"init_lora_weights is {initialization[:40]}, which changes the base model"
    for name, value in content.items():
        if name not in _UNDERSTOOD and value:
            why = _WHY_UNSUPPORTED.get(name, "it is not known what that means")
            yield f"{name[:60]} is set: {why}"


def check_types(content: dict[str, Any], path: str) -> None:
    """Check that the settings that are read have the types that PEFT gives them.

    Raises:
        SimPOError: one has another type.
    """
    types: dict[str, tuple[type, ...]] = {
        "target_modules": (str, list),
        "exclude_modules": (str, list),
        "target_parameters": (list,),
        "layers_to_transform": (int, list),
        "layers_pattern": (str, list),
        "rank_pattern": (dict,),
        "alpha_pattern": (dict,),
        "use_rslora": (bool,),
        "use_dora": (bool,),
        "base_model_name_or_path": (str,),
        "revision": (str,),
    }
    for name, allowed in types.items():
        value = content.get(name)
        item_type = int if name == "layers_to_transform" else str
        is_valid = value is None or isinstance(value, allowed)
        if is_valid and isinstance(value, list):
            is_valid = all(type(item) is item_type for item in value)
        if not is_valid:
            kinds = " or ".join(kind.__name__ for kind in allowed)
            raise SimPOError(f"{path}: {name} is {str(value)[:40]}; it must be a {kinds}")
