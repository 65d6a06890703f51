"""SimPO (Simple Preference Optimization) LoRA fine-tuning on Apple Silicon, with MLX.

>>> from mlx_simpo import load_config, train
>>> result = train(load_config("recipe.yaml", ["train.learning_rate=2e-5"]))
"""

from .config import (
    DataConfig,
    LogpsConfig,
    LoRAConfig,
    ObjectiveConfig,
    SimPOConfig,
    TrainConfig,
    load_config,
)
from .data.encode import EncodedPair, Encoder, encode_pairs
from .data.pairs import load_pairs
from .errors import SimPOError
from .evaluation import Evaluation, evaluate_pairs
from .model.adapters import load_adapter
from .model.loading import load_model
from .objectives import simpo_loss
from .run import TrainResult, evaluate, generate, inspect, train
from .session import Session, prepare
from .trainer import StepMetrics, train_steps

__version__ = "0.1.0"

__all__ = [
    "DataConfig",
    "EncodedPair",
    "Encoder",
    "Evaluation",
    "LoRAConfig",
    "LogpsConfig",
    "ObjectiveConfig",
    "Session",
    "SimPOConfig",
    "SimPOError",
    "StepMetrics",
    "TrainConfig",
    "TrainResult",
    "encode_pairs",
    "evaluate",
    "evaluate_pairs",
    "generate",
    "inspect",
    "load_adapter",
    "load_config",
    "load_model",
    "load_pairs",
    "prepare",
    "simpo_loss",
    "train",
    "train_steps",
]
