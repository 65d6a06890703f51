"""A model folder: weights in shards, config.json, and the files beside them."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import make_shards

from ..files import read_json, save_safetensors, write_text
from ..model.rope import with_both_rope_spellings
from .weights import natural

# What a model's folder may hold beside weights and configuration, and what goes with the model.
_COMPANIONS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template.*",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_*.json",
    "LICENSE*",
    "NOTICE*",
)
_DTYPE = ("dtype", "torch_dtype")
_TEMPLATE = "chat_template.jinja"


def write_weights(folder: Path, tensors: dict[str, mx.array], form: str) -> None:
    """Write tensors as model*.safetensors, in shards of 5 GB with an index; empties ``tensors``.

    Args:
        form: what the files say of themselves: "pt" for the names of transformers, "mlx" for
            MLX's. transformers refuses files that say nothing.
    """
    shards = make_shards({name: tensors[name] for name in sorted(tensors, key=natural)})
    total = sum(array.nbytes for array in tensors.values())
    tensors.clear()
    places: dict[str, str] = {}
    count = len(shards)
    for number in range(count):
        shard, shards[number] = shards[number], {}
        name = "model.safetensors"
        if count > 1:
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_safetensors(folder / name, shard, form)
        places |= dict.fromkeys(shard, name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def write_config(folder: Path, config: dict[str, Any], dtype: str, *, trusted: bool) -> None:
    """Write the config.json of a model that is not quantized, for transformers old and new.

    Args:
        config: the base model's, as it stands in its folder. dtype: of the weights. trusted:
            whether the model's own code goes with it.
    """
    config = {name: value for name, value in config.items() if not name.startswith("quantiz")}
    if not trusted:
        config.pop("auto_map", None)
    for part in ("text_config", "vision_config", "audio_config"):
        if isinstance(inner := config.get(part), dict):
            kept = {name: value for name, value in inner.items() if not name.startswith("quantiz")}
            kept |= dict.fromkeys([n for n in _DTYPE if n in kept], dtype)
            config[part] = with_both_rope_spellings(kept) if part == "text_config" else kept
    config |= dict.fromkeys([n for n in _DTYPE if n in config] or ["dtype"], dtype)
    # What is in text_config has been seen to.
    config = with_both_rope_spellings({n: v for n, v in config.items() if n != "text_config"}) | {
        n: v for n, v in config.items() if n == "text_config"
    }
    write_json(folder / "config.json", dict(sorted(config.items())))


def copy_companions(source: Path, folder: Path, template: str | None, *, trusted: bool) -> None:
    """Copy tokenizer, generation settings and licence as they are, with the template in use.

    transformers would write the tokenizer anew, in its own version's way, which older readers and
    other programs may not know.

    Args:
        template: the chat template that the adapter was trained with; None keeps the model's.
    """
    patterns = (*_COMPANIONS, "*.py") if trusted else _COMPANIONS
    for path in sorted({p for pattern in patterns for p in source.glob(pattern) if p.is_file()}):
        if belongs(path):
            shutil.copyfile(path, folder / path.name)
    if template is None:
        return
    write_text(folder / _TEMPLATE, template)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        content = read_json(settings)
        # Programs that do not know the file beside it read the template here.
        if "chat_template" in content:
            write_json(settings, content | {"chat_template": template})


def belongs(path: Path) -> bool:
    """Whether a file's content lies in its folder; huggingface_hub's are links into its cache."""
    root = path.parent.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root
    return path.resolve().is_relative_to(root)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """JSON as transformers writes it."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
