"""SimPO (Simple Preference Optimization) LoRA fine-tuning on Apple Silicon, with MLX.

>>> from mlx_simpo import load_config, train
>>> result = train(load_config("recipe.yaml", ["train.learning_rate=2e-5"]))
"""

from .api import TrainResult, evaluate, generate, inspect, train
from .config.simpo_config import (
    DataConfig,
    LogpsConfig,
    LoRAConfig,
    ObjectiveConfig,
    SimPOConfig,
    TrainConfig,
    load_config,
)
from .convert import Conversion, from_hf, from_peft, fuse, to_peft
from .data.encode import EncodedPair, Encoder, encode_pairs
from .data.pairs import load_pairs
from .errors import SimPOError
from .evaluation import Evaluation, evaluate_pairs
from .hub import Push, push
from .model.adapters import load_adapter
from .model.loading import load_model
from .objectives import simpo_loss
from .training.session import Session, prepare
from .training.trainer import StepMetrics, train_steps
from .version import __version__ as __version__

__all__ = [
    "Conversion",
    "DataConfig",
    "EncodedPair",
    "Encoder",
    "Evaluation",
    "LoRAConfig",
    "LogpsConfig",
    "ObjectiveConfig",
    "Push",
    "Session",
    "SimPOConfig",
    "SimPOError",
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
    "simpo_loss",
    "to_peft",
    "train",
    "train_steps",
]
