"""SimPO (Simple Preference Optimization) LoRA fine-tuning on Apple Silicon, with MLX.

>>> from mlx_simpo import load_config, train
>>> result = train(load_config("recipe.yaml", ["train.learning_rate=2e-5"]))

Public names are loaded when they are first used (PEP 562): importing the package loads neither MLX
nor mlx-lm, and on a Linux CPU makes MLX fast if MLX is imported later (see `blas`).
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import blas as _blas
from .version import __version__ as __version__

if TYPE_CHECKING:  # what type checkers and editors read; _MODULES says the same to Python
    from .api import evaluate, inspect, train
    from .config.early_stopping import EarlyStoppingConfig
    from .config.simpo_config import (
        DataConfig,
        EngineConfig,
        LogpsConfig,
        LoRAConfig,
        MemoryConfig,
        ObjectiveConfig,
        SimPOConfig,
        TrainConfig,
        load_config,
        resume_config,
    )
    from .config.sources import SourceConfig
    from .convert import Conversion, from_hf, from_peft, fuse, to_peft
    from .data.encode import EncodedPair, Encoder, encode_pairs
    from .data.pairs import load_pairs
    from .data.records import Pair
    from .errors import InvalidSettingsError, SimPOError
    from .evaluation import Evaluation, evaluate_pairs
    from .generation import generate, stream_responses
    from .hub import Push, push
    from .model.adapters import load_adapter
    from .model.loading import load_model
    from .objectives import simpo_loss
    from .sampling.generate import Response
    from .sampling.responder import ResponsePart
    from .sampling.settings import SamplingSettings
    from .training.result import TrainResult
    from .training.session import Session, prepare
    from .training.trainer import StepMetrics, train_steps

__all__ = [
    "Conversion",
    "DataConfig",
    "EarlyStoppingConfig",
    "EncodedPair",
    "Encoder",
    "EngineConfig",
    "Evaluation",
    "InvalidSettingsError",
    "LoRAConfig",
    "LogpsConfig",
    "MemoryConfig",
    "ObjectiveConfig",
    "Pair",
    "Push",
    "Response",
    "ResponsePart",
    "SamplingSettings",
    "Session",
    "SimPOConfig",
    "SimPOError",
    "SourceConfig",
    "StepMetrics",
    "TrainConfig",
    "TrainResult",
    "encode_pairs",
    "evaluate",
    "evaluate_pairs",
    "from_hf",
    "from_peft",
    "fuse",
    "generate",
    "inspect",
    "load_adapter",
    "load_config",
    "load_model",
    "load_pairs",
    "prepare",
    "push",
    "resume_config",
    "simpo_loss",
    "stream_responses",
    "to_peft",
    "train",
    "train_steps",
]

_MODULES = {
    "api": ("evaluate", "inspect", "train"),
    "config.early_stopping": ("EarlyStoppingConfig",),
    "config.simpo_config": (
        "DataConfig",
        "EngineConfig",
        "LogpsConfig",
        "LoRAConfig",
        "MemoryConfig",
        "ObjectiveConfig",
        "SimPOConfig",
        "TrainConfig",
        "load_config",
        "resume_config",
    ),
    "config.sources": ("SourceConfig",),
    "convert": ("Conversion", "from_hf", "from_peft", "fuse", "to_peft"),
    "data.encode": ("EncodedPair", "Encoder", "encode_pairs"),
    "data.pairs": ("load_pairs",),
    "data.records": ("Pair",),
    "errors": ("InvalidSettingsError", "SimPOError"),
    "evaluation": ("Evaluation", "evaluate_pairs"),
    "generation": ("generate", "stream_responses"),
    "hub": ("Push", "push"),
    "model.adapters": ("load_adapter",),
    "model.loading": ("load_model",),
    "objectives": ("simpo_loss",),
    "sampling.generate": ("Response",),
    "sampling.responder": ("ResponsePart",),
    "sampling.settings": ("SamplingSettings",),
    "training.result": ("TrainResult",),
    "training.session": ("Session", "prepare"),
    "training.trainer": ("StepMetrics", "train_steps"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

_blas.load()


def __getattr__(name: str) -> Any:
    """Load a public name at its first use.

    Raises:
        AttributeError: there is no such name.
    """
    if name not in _MODULE_OF:
        message = f"module {__name__!r} has no attribute {name!r}; its names are in __all__"
        raise AttributeError(message)  # Python adds "Did you mean …?" from __dir__
    value = getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
