"""What the tests share that plant mistakes in the conversions."""

from collections.abc import Callable
from pathlib import Path
from sys import modules
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

FUSE, FROM_HF = modules["mlx_simpo.convert.fuse"], modules["mlx_simpo.convert.from_hf"]
WRONG = "verification failed, so nothing was written"
Arrays = dict[str, mx.array]
Patch = pytest.MonkeyPatch
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2, **UNTIED}
GLU: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
# Adapters of the tests: the type of their base model, the modules they adapt, rank, whether DoRA.
ADAPTERS: dict[str, tuple[str, list[str], int, bool]] = {
    "llama": ("llama", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"], 2, False),
    "square": ("llama", ["self_attn.q_proj", "self_attn.o_proj"], 32, False),
    "dora": ("llama", ["self_attn.q_proj", "mlp.up_proj"], 2, True),
    "mixtral": ("mixtral", [f"block_sparse_moe.switch_mlp.{n}" for n in GLU], 2, False),
}


def checkpoint_names(weights: Arrays) -> Arrays:
    """Split MLX's stacked experts into Mixtral's tensors, one per expert."""
    renamed: Arrays = {}
    for name, array in weights.items():
        prefix, separator, rest = name.partition("switch_mlp.")
        if not separator:
            renamed[name] = array
            continue
        short = dict(zip(GLU, ("w1", "w3", "w2"), strict=True))[rest.partition(".")[0]]
        renamed |= {f"{prefix}experts.{n}.{short}.weight": one for n, one in enumerate(array)}
    return renamed


def trainable_weights(model: nn.Module) -> list[tuple[str, mx.array]]:
    """Return the trainable weights of a model by their names."""
    return tree_flatten(model.trainable_parameters())  # type: ignore[return-value]


def random_weight(name: str, array: mx.array) -> mx.array:
    """Return random values for a weight, large enough to matter; for a magnitude, near its own."""
    noise = mx.random.normal(array.shape)
    return array * (1 + 0.2 * noise) if name.endswith(".m") else noise * 0.15


def base_folder(folders: Path, adapter: str) -> Path:
    """Return the folder of an adapter's base model."""
    return folders / f"{ADAPTERS[adapter][0]}-base"


ConvertVerified = Callable[[str, str], None]


def after(patch: Patch, module: Any, name: str, change: Callable[..., Any]) -> None:
    """Replace a function so that its result passes through ``change(result, *arguments)``."""
    real = getattr(module, name)
    patch.setattr(module, name, lambda *a, **k: change(real(*a, **k), *a))


def before(patch: Patch, module: Any, name: str, change: Callable[..., None]) -> None:
    """Replace a function so that its arguments are changed in place first."""
    real = getattr(module, name)

    def changed(*arguments: Any, **more: Any) -> Any:
        change(*arguments)
        return real(*arguments, **more)

    patch.setattr(module, name, changed)


EXPERT_ORDER = mx.array([1, 0, 2, 3])


def all_of(part: str, change: Callable[[mx.array], mx.array]) -> Callable[[Arrays], None]:
    """Return a function that changes the weights that have this in their names."""
    return lambda weights: weights.update({n: change(a) for n, a in weights.items() if part in n})


def swap(weights: Arrays, one: str, other: str) -> None:
    """Exchange two weights."""
    weights[one], weights[other] = weights[other], weights[one]
