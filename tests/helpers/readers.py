"""The readers of what comes from elsewhere, each as a function of bytes, for tests and fuzzing.

Each takes the content of the files and an empty folder to write them into, and returns whether the
content was accepted. A `SimPOError`, or another error that the reader documents, is what a user can
fix; whatever else is raised is a defect and passes through. The seeds are content that is accepted,
from which others are made by changing it.
"""

import copy
import gzip
import hashlib
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import numpy as np
from helpers.tiny import (
    assistant,
    some_pairs,
    system,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    user,
)

from mlx_simpo import DataConfig, LoRAConfig, SimPOError, load_config
from mlx_simpo.convert.architectures import Architecture, table_entry
from mlx_simpo.convert.mlx_format import write_mlx
from mlx_simpo.convert.peft.read import read_peft
from mlx_simpo.data.cache import DamagedCacheError, load_folder, write_manifest
from mlx_simpo.data.encode import EncodedPair, Encoder
from mlx_simpo.data.pairs import Quarantined
from mlx_simpo.data.rows import Row
from mlx_simpo.data.sources import open_source
from mlx_simpo.data.tokenize import encode_row, write_tokens
from mlx_simpo.files import write_text
from mlx_simpo.model.adapters import check_adapter, check_fits, load_adapter, save_adapter
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.runs import manifest
from mlx_simpo.runs.checkpoints import list_checkpoints, newest_valid

Reader = Callable[[bytes, Path], bool]
SEPARATOR = b"\n---\n"  # between the parts of content that is more than one file
# More than a manifest is deep, and less than what Python can read and write.
_MAX_DEPTH = 50


# --- records ---------------------------------------------------------------------------------


@cache
def encoders() -> list[Encoder]:
    """Encoders by every rule: with a chat template, as plain text, and the authors' way."""
    lengths: dict[str, Any] = {"max_length": 96, "max_prompt_length": 48}
    bos = tiny_tokenizer(bos="<s>", adds_bos=True)
    return [
        Encoder(tiny_tokenizer(), DataConfig(**lengths)),
        Encoder(tiny_tokenizer(), DataConfig(implicit_string_prompts=True, **lengths)),
        Encoder(tiny_tokenizer(None), DataConfig(**lengths)),
        Encoder(bos, DataConfig(compat="official", **lengths)),
    ]


def read_records(content: bytes, folder: Path) -> bool:
    """Read JSON Lines, compressed if they begin like gzip; accepted: an encoder takes them all."""
    is_compressed = content.startswith(b"\x1f\x8b")
    path = folder / ("pairs.jsonl.gz" if is_compressed else "pairs.jsonl")
    path.write_bytes(content)
    quarantined: list[Quarantined] = []
    accepted = False
    for encoder in encoders():
        before = len(quarantined)
        try:
            for row in open_source(str(path)).rows():
                outcome = encode_row(encoder, row)
                if isinstance(outcome, Quarantined):
                    quarantined.append(outcome)
                else:
                    check_pair(outcome[0])
        except SimPOError:  # unreadable as gzip, or a conversation without a chat template
            continue
        accepted |= len(quarantined) == before
    # As a run does with them.
    lines = [json.dumps(q._asdict(), ensure_ascii=False) for q in quarantined]
    write_text(folder / "quarantined.jsonl", "\n".join(lines))
    return accepted


def check_pair(pair: EncodedPair) -> None:
    """Assert what an engine relies on."""
    for sequence in (pair.chosen, pair.rejected):
        assert sequence.tokens.dtype == np.int32
        assert 1 <= sequence.score_start < len(sequence.tokens) <= 96
        assert 0 <= sequence.tokens.min() <= sequence.tokens.max() < 512


# --- configurations --------------------------------------------------------------------------


def read_config(content: bytes, folder: Path) -> bool:
    """Read YAML and, after NULs, settings of the form name=value; accepted: it reads back."""
    text, *settings = content.split(b"\0")
    path = folder / "recipe.yaml"
    path.write_bytes(text)
    overrides = [setting.decode("utf-8", "surrogateescape") for setting in settings]
    try:
        config = load_config(path, overrides)
    except SimPOError:
        return False
    write_text(path, config.to_yaml())
    try:
        again = load_config(path)
    except SimPOError:
        # An argument of the command line that is not UTF-8 has no YAML.
        assert not content.isascii()
        return False
    assert again == config or not content.isascii()
    return True


# --- adapters --------------------------------------------------------------------------------


@cache
def _rule() -> Architecture:
    rule = table_entry(tiny_config())
    assert rule is not None
    return rule


def read_adapter(content: bytes, folder: Path) -> bool:
    """Read adapter_config.json and the weights, as mlx-lm's adapter and as PEFT's; accepted: one of
    them is."""
    config, _, weights = content.partition(SEPARATOR)
    (folder / "adapter_config.json").write_bytes(config)
    for name in ("adapters.safetensors", "adapter_model.safetensors"):
        (folder / name).write_bytes(weights)
    accepted = False
    try:
        check_adapter(folder)
        check_fits(tiny_model(), folder)
        load_adapter(model := tiny_model(), folder)
        mx.eval(model.parameters())
        accepted = True
    except SimPOError:
        pass
    try:
        deltas = read_peft(folder, model := tiny_model(), _rule())
        (folder / "converted").mkdir()
        write_mlx(folder / "converted", deltas, model, {})
        accepted = True
    except SimPOError:
        pass
    return accepted


# --- checkpoints -----------------------------------------------------------------------------


def read_checkpoint(content: bytes, folder: Path) -> bool:
    """Read a checkpoint's manifest, and its two files after separators; accepted: it is whole.

    Manifests of JSON get the checksum that belongs to them: otherwise that alone would be tested.
    """
    raw, _, files = content.partition(SEPARATOR)
    state, _, progress = files.partition(SEPARATOR)
    checkpoint = folder / "step-000003"
    checkpoint.mkdir()
    (checkpoint / "state.safetensors").write_bytes(state)
    (checkpoint / "progress.json").write_bytes(progress)
    rest = _json_object(raw)
    sealed = raw if rest is None else manifest._encode(rest)
    (checkpoint / manifest.MANIFEST).write_bytes(sealed)
    assert list_checkpoints(folder) == [checkpoint]
    try:
        newest, messages = newest_valid(folder)
    except SimPOError:  # of a newer version
        return False
    assert (newest is None) == bool(messages)
    return newest is not None


def read_token_cache(content: bytes, folder: Path) -> bool:
    """Read the manifest of cached tokens beside valid files; accepted: they are used.

    As for checkpoints, the checksum is made to fit.
    """
    _write_cached_tokens(folder)
    path = folder / "manifest.json"
    if content:
        rest = _json_object(content)
        text = content if rest is None else json.dumps(rest).encode()
        path.write_bytes(hashlib.sha256(text).hexdigest()[:32].encode() + b"\n" + text + b"\n")
    try:
        loaded = load_folder(folder)
    except DamagedCacheError:
        return False
    for pair in loaded.pairs:
        check_pair(pair)
    for record in loaded.quarantined:
        assert isinstance(record.location, str)
    return True


def _json_object(content: bytes) -> dict[str, Any] | None:
    """Return a JSON object that is not nested too deeply to be written again, or None."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return None
    deepest = max(content.count(b"["), content.count(b"{"))
    return value if isinstance(value, dict) and deepest < _MAX_DEPTH else None


def _write_cached_tokens(folder: Path) -> None:
    rows = [Row(i, f"pairs.jsonl:{i + 1}", record) for i, record in enumerate(some_pairs(3))]
    write_tokens(folder, encoders()[0], rows, workers=1)
    write_manifest(folder, "pairs.jsonl", [Quarantined("pairs.jsonl:4", "empty response")])


# --- seeds -----------------------------------------------------------------------------------


def _lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def record_seeds() -> list[bytes]:
    """Records of every accepted form."""
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    forms: list[Any] = [
        some_pairs(2)[1],
        {"chosen": "The sky is blue.", "rejected": "The sky is bluer."},
        {
            "prompt": [system("Be kind."), user("Hi")],
            "chosen": [assistant("Hello.")],
            "rejected": [assistant([{"type": "text", "text": "What?"}])],
        },
        {
            "prompt": "Hi",
            "chosen": [user("Hi"), assistant("Hello.")],
            "rejected": [user("Hi"), assistant("Go."), user("No"), assistant("Ok")],
            "tools": json.dumps([tool]),
        },
        {
            "prompt": [user("Hi")],
            "chosen": [assistant("a", tool_calls=[{"function": {"name": "f", "arguments": {}}}])],
            "rejected": [assistant("é😀 \u2028")],
            "tools": [tool],
            "score": 1.5e-3,
        },
    ]
    seeds = [_lines([form]) for form in forms]
    return [*seeds, b"\xef\xbb\xbf" + _lines(forms), gzip.compress(_lines(forms[:1]), mtime=0)]


def config_seeds() -> list[bytes]:
    """A whole configuration, a short one, and one from the command line."""
    whole = load_config(None, ["model=a/b", "data.train=x.jsonl", "lora.target_modules=[q_proj]"])
    short = (
        "model: a/b  # a comment\ndata:\n  train: 'x'\n  max_length: 64\n  max_prompt_length: 8\n"
    )
    return [
        whole.to_yaml().encode(),
        f"{short}train: {{learning_rate: 1e-6, steps: 3}}\n".encode(),
        b"\0model=a/b\0lora.rank=8\0train.learning_rate=5e-5\0data.valid=null\0lora.dora=true",
    ]


def adapter_seeds(folder: Path) -> list[bytes]:
    """An adapter in mlx-lm's format, and two in PEFT's, made in an empty folder."""
    seeds = []
    model = tiny_model()
    lora = LoRAConfig(rank=2, target_modules=("q_proj", "down_proj"))
    save_adapter(folder, model, attach_lora(model, lora, seed=0))
    config, weights = (folder / n for n in ("adapter_config.json", "adapters.safetensors"))
    seeds.append(config.read_bytes() + SEPARATOR + weights.read_bytes())
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    tensors = {
        f"base_model.model.{name}.lora_{matrix}.weight": mx.ones(shape)
        for name in names
        for matrix, shape in (("A", (2, 32)), ("B", (32, 2)))
    }
    mx.save_safetensors(str(weights), tensors, {"format": "pt"})
    peft = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    pattern = {"target_modules": r".*\.q_proj", "rank_pattern": {"q_proj": 2}, "r": 8}
    for settings in (peft, peft | pattern | {"use_rslora": True, "alpha_pattern": {}}):
        seeds.append(json.dumps(settings).encode() + SEPARATOR + weights.read_bytes())
    return seeds


def checkpoint_seeds() -> list[bytes]:
    """A checkpoint of two small files."""
    files = {"state.safetensors": b"some bytes", "progress.json": b'{"step": 3}'}
    entries = {name: [len(c), hashlib.sha256(c).hexdigest()] for name, c in files.items()}
    content = json.dumps({"format": 1, "step": 3, "files": entries}).encode()
    return [SEPARATOR.join([content, *files.values()])]


def token_cache_seeds(folder: Path) -> list[bytes]:
    """The manifest of the tokens that `read_token_cache` writes, made in an empty folder."""
    _write_cached_tokens(folder)
    return [(folder / "manifest.json").read_bytes().splitlines()[1]]


# --- changed seeds ---------------------------------------------------------------------------

# What takes the place of a value: of every type, at the edges of what a type can hold.
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 16, 2**31, 2**63, -(2**63), 10**400, 0.5, -0.0, 1e300),
    *(
        float("nan"),
        float("inf"),
        "",
        " ",
        "a",
        "q_proj",
        "\ud800",
        "\0",
        "é😀",
        "x" * 300,
        "9" * 5000,
    ),
    *("../../x", "/etc/passwd", "(((a+)+)+)+$", "[" * 4000, "user", "assistant", "lora", "LORA"),
    *([], {}, [[]], [None], {"": None}, {"role": "assistant", "content": "b"}),
)


def change_json(content: bytes, random: Random) -> bytes | None:
    """Return JSON, or one line of JSON Lines, with one value replaced, removed, moved or nested;
    None if the content is not JSON, or nested too deeply."""
    lines = content.split(b"\n")
    index = random.choice([i for i, line in enumerate(lines) if line.strip()] or [0])
    try:
        root = [json.loads(lines[index])]
        _change_value(root, random)
        lines[index] = json.dumps(root[0]).encode()
    except (ValueError, RecursionError):
        return None
    return b"\n".join(lines)


def _change_value(root: list[Any], random: Random) -> None:
    """Change one value in nested lists and dicts, in place."""
    positions: list[tuple[Any, Any]] = [(root, 0)]
    for container, key in positions:  # grows on the way
        value = container[key]
        if isinstance(value, dict | list) and len(positions) < 1000:
            keys = list(value) if isinstance(value, dict) else range(len(value))
            positions += [(value, k) for k in keys]
    container, key = random.choice(positions)
    other, other_key = random.choice(positions)
    kind = random.randrange(6)
    if kind == 0 and container is not root:
        del container[key]
    elif kind == 1:
        container[key] = copy.deepcopy(other[other_key])
    elif kind == 2:
        for _ in range(random.choice([1, 2, 30, 300])):
            container[key] = [container[key]]
    elif kind == 3 and isinstance(container, dict):
        container[random.choice([str(v)[:40] for v in _VALUES])] = container.pop(key)
    elif kind == 4 and isinstance(container[key], str):
        text = container[key]
        cut = random.randrange(len(text) + 1)
        container[key] = text[:cut] + str(random.choice(_VALUES)) + text[cut:]
    else:
        container[key] = copy.deepcopy(random.choice(_VALUES))
