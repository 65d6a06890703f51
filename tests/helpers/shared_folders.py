"""Small folders of every kind that can be shared, with a training record or without."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub import ModelCard, ModelCardData

from mlx_simpo import load_config
from mlx_simpo.config.yaml import parse_yaml
from mlx_simpo.hub.folders import Folder, open_folder

BASE = "mlx-community/Qwen2.5-1.5B-Instruct-4bit"


def settings(**changes: Any) -> dict[str, Any]:
    """All settings of a run as nested mappings."""
    values = {"model": BASE, "revision": "v1.0", "data.train": "trl-lib/ultrafeedback", **changes}
    overrides = [
        f"{name}={value if isinstance(value, str) else json.dumps(value)}"
        for name, value in values.items()
    ]
    content = parse_yaml(load_config(None, overrides).to_yaml(), "settings")
    assert isinstance(content, dict)
    return content


def evaluation(loss: float, accuracy: float, pairs: int = 50) -> dict[str, Any]:
    """An evaluation as summary.json holds it."""
    return {
        "pairs": pairs,
        "loss": loss,
        "rewards/accuracies": accuracy,
        "rewards/accuracies_interval": [accuracy - 0.05, accuracy + 0.05],
    }


def training_record(**changes: Any) -> dict[str, Any]:
    """The content of mlx_simpo.json as a conversion writes it."""
    summary = {
        "adapter": "/home/ann/secret-client/runs/mine",
        "pairs": 950,
        "steps": 60,
        "interrupted": False,
        "train": {"epoch": 1.0},
        "before": evaluation(1.3125, 0.52),
        "after": evaluation(0.75, 0.84),
    }
    return {
        "version": "0.1.0",
        "base": {
            "model": BASE,
            "revision": "v1.0",
            "quantization": {"bits": 4, "group_size": 64},
        },
        "template_sha256": "ab" * 32,
        "training": {"config": settings(), "summary": summary},
        **changes,
    }


def write_json(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_weights(path: Path, format: str = "pt") -> None:
    mx.save_safetensors(str(path), {"weight": mx.zeros((4, 4))}, {"format": format})


def peft_folder(folder: Path, record: dict[str, Any] | None = None, base: str = BASE) -> Path:
    """The folder of a PEFT adapter."""
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "r": 16, "lora_alpha": 32}
    write_json(folder / "adapter_config.json", config)
    write_weights(folder / "adapter_model.safetensors")
    if record is not None:
        write_json(folder / "mlx_simpo.json", record)
    return folder


def whole_folder(folder: Path, format: str, record: dict[str, Any] | None = None) -> Path:
    """The folder of a whole model; format: pt or mlx."""
    folder.mkdir()
    write_json(folder / "config.json", {"model_type": "llama", "_name_or_path": "/home/ann/llama"})
    write_json(folder / "tokenizer_config.json", {"name_or_path": "/home/ann/llama", "bos": "/s"})
    (folder / "tokenizer.json").write_text("{}")
    write_weights(folder / "model.safetensors", format)
    if record is not None:
        write_json(folder / "mlx_simpo.json", record)
    return folder


def run_copy(adapter: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a finished run's folder, with settings changed in its config.yaml."""
    shutil.copytree(adapter, folder)
    if changes:
        (folder / "config.yaml").write_text(json.dumps(settings(**changes)), encoding="utf-8")
    return folder


def card_data(card: ModelCard) -> ModelCardData:
    """Return the metadata of a model card."""
    data: Any = card.data  # huggingface_hub annotates it with an attribute, which is not a type
    return data


def every_kind(adapter: Path, folder: Path) -> dict[str, Folder]:
    """One opened folder of each kind, each with a record."""
    folder.mkdir(exist_ok=True)
    paths = {
        "run": run_copy(adapter, folder / "run"),
        "peft": peft_folder(folder / "peft", training_record()),
        "transformers": whole_folder(folder / "hf", "pt", training_record()),
        "mlx": whole_folder(folder / "mlx", "mlx", training_record()),
    }
    return {name: open_folder(path) for name, path in paths.items()}
