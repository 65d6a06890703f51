"""Folders of tiny models in MLX's format, and of random adapters on them."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from helpers.tiny import tiny_config, tiny_model, tiny_tokenizer
from mlx.utils import tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import quantize_model, save_config, save_model

from mlx_simpo import load_model
from mlx_simpo.model.adapters import save_adapter

MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}


def mlx_model(
    folder: Path, model_type: str = "llama", bits: int | None = None, **changes: Any
) -> Path:
    """Write a tiny model in MLX's format and return its folder.

    Args:
        bits: quantize to so many; None does not quantize.
        changes: to the model's configuration.
    """
    model, config = tiny_model(model_type, **changes), tiny_config(model_type, **changes)
    if bits is not None:
        model, config = quantize_model(model, config, 32, bits)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    tiny_tokenizer()._tokenizer.save_pretrained(folder)
    return folder


def mlx_adapter(
    base: Path, folder: Path, size: float = 0.3, *, dora: bool = False, **settings: Any
) -> Path:
    """Write an mlx-lm adapter with random weights and return its folder.

    Args:
        size: standard deviation of the noise that is added to the initial weights.
        settings: changes to lora_parameters.
    """
    model = load_model(str(base)).model
    model.freeze()
    parameters = {"rank": 2, "scale": 1.5, "dropout": 0.0, "keys": None, **settings}
    linear_to_lora_layers(model, -1, parameters, use_dora=dora)
    mx.random.seed(1)
    trainable = model.trainable_parameters()
    model.update(tree_map(lambda p: p + mx.random.normal(p.shape) * size, trainable))
    config = {"fine_tune_type": "dora" if dora else "lora", "num_layers": -1}
    return save_adapter(
        folder, model, {**config, "lora_parameters": parameters, "model": str(base)}
    )
