"""A model folder: weights in shards, config.json, and the files beside them."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import make_shards

from ..files import is_inside_its_folder, read_json, save_safetensors, write_text
from ..model.rope import with_both_rope_spellings
from .weights import natural_sort_key

# Files beside weights and configuration that are copied with the model.
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
_DTYPE = ("dtype", "torch_dtype")  # the keys of transformers 5 and 4
_TEMPLATE = "chat_template.jinja"


def write_weights(folder: Path, tensors: dict[str, mx.array], form: str) -> None:
    """Write tensors as model*.safetensors, in shards of 5 GB with an index; empties ``tensors``.

    Args:
        tensors: by name; emptied, so that memory is freed after each shard.
        form: the "format" in the files' metadata: "pt" for transformers' names, "mlx" for MLX's.
            transformers rejects files without it.
    """
    shards = make_shards({name: tensors[name] for name in sorted(tensors, key=natural_sort_key)})
    total = sum(array.nbytes for array in tensors.values())
    tensors.clear()
    shard_of: dict[str, str] = {}
    count = len(shards)
    for number in range(count):
        shard, shards[number] = shards[number], {}
        name = "model.safetensors"
        if count > 1:
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_safetensors(folder / name, shard, form)
        shard_of |= dict.fromkeys(shard, name)
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(shard_of.items()))}
        write_json(folder / "model.safetensors.index.json", index)


def write_config(folder: Path, config: dict[str, Any], dtype: str, *, trusted: bool) -> None:
    """Write the config.json of a model that is not quantized, for old and new transformers.

    Args:
        config: the base model's, as it is in its folder.
        dtype: of the weights.
        trusted: whether the model's own code is copied with it.
    """
    config = {name: value for name, value in config.items() if not name.startswith("quantiz")}
    if not trusted:
        config.pop("auto_map", None)
    for part in ("text_config", "vision_config", "audio_config"):
        if isinstance(inner := config.get(part), dict):
            inner = {name: value for name, value in inner.items() if not name.startswith("quantiz")}
            inner |= dict.fromkeys([n for n in _DTYPE if n in inner], dtype)
            config[part] = with_both_rope_spellings(inner) if part == "text_config" else inner
    config |= dict.fromkeys([n for n in _DTYPE if n in config] or ["dtype"], dtype)
    # Without text_config, whose rotary settings are in both spellings already.
    config = with_both_rope_spellings({n: v for n, v in config.items() if n != "text_config"}) | {
        n: v for n, v in config.items() if n == "text_config"
    }
    write_json(folder / "config.json", dict(sorted(config.items())))


def copy_companions(source: Path, folder: Path, template: str | None, *, trusted: bool) -> None:
    """Copy tokenizer, generation settings and licence unchanged, except for the chat template.

    transformers would save the tokenizer in the format of its own version, which older versions and
    other programs cannot always read.

    Args:
        template: the chat template that the adapter was trained with; None keeps the model's.
        trusted: whether the model's own code is copied with it.
    """
    patterns = (*_COMPANIONS, "*.py") if trusted else _COMPANIONS
    for path in sorted({p for pattern in patterns for p in source.glob(pattern) if p.is_file()}):
        if is_inside_its_folder(path):
            shutil.copyfile(path, folder / path.name)
    if template is None:
        return
    write_text(folder / _TEMPLATE, template)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        content = read_json(settings)
        # Programs that do not know chat_template.jinja read the template from here.
        if "chat_template" in content:
            write_json(settings, content | {"chat_template": template})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON in the layout that transformers uses."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
