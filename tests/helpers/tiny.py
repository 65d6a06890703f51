"""Small tokenizers and models for the tests: made in a second, random, and just like the real ones
in everything that the package looks at."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mlx_simpo.data.encode import EncodedPair, TokenizedSequence
from mlx_simpo.data.pairs import held_out, prompt_text
from mlx_simpo.data.records import Pair

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes BOS and EOS itself, no header for the assistant (as Llama 2 and Mistral do).
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant turns') }}{% endif %}{% endfor %}"
)
# Leaves no end-of-turn token at all.
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

_TEXT = [
    "The quick brown fox jumps over the lazy dog while the sky is blue and the sea is bluer still.",
    "A system, a user and an assistant: be kind, answer in a few words, and say why.",
    "numbers 0 1 2 3 4 5 6 7 8 9, newlines\nand\n\nspaces  here",
] * 4


def tiny_tokenizer(
    template: str | None = CHATML, *, bos: str | None = None, adds_bos: bool = False
) -> TokenizerWrapper:
    """A byte-level BPE tokenizer of about 500 tokens in mlx-lm's wrapper.

    bos: the text of the BOS token ("<s>" or "<|im_start|>"), or None for a tokenizer without one.
    adds_bos: encode() puts BOS first by itself.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    if adds_bos:
        assert bos is not None
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    eos = "<|im_end|>" if template == CHATML else "</s>"
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, chat_template=template
    )
    return TokenizerWrapper(wrapped)


_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def tiny_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_COMMON, **changes}


def tiny_model(model_type: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random model of an mlx-lm architecture, float32, with logits of some size.

    Typed as Any because pyright infers from MLX that every attribute of a module may be None.
    """
    config = tiny_config(model_type, **changes)
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(config))
    weights = [
        (name, mx.random.normal(p.shape) * 0.2 if p.ndim > 1 else p)
        for name, p in tree_flatten(model.parameters())
    ]
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def tiny_folder(folder: Path, seed: int = 0, template: str | None = CHATML) -> Path:
    """A model folder as from the Hub: config.json, model.safetensors and a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    model = tiny_model(seed=seed)
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    tiny_tokenizer(template)._tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def token_pair(prompt: int, chosen: int, rejected: int, seed: int = 0) -> EncodedPair:
    """Responses of so many random tokens behind the same prompt; no token is 0."""
    rng = np.random.default_rng([prompt, chosen, rejected, seed])
    before = rng.integers(1, 500, prompt)
    first, second = (
        TokenizedSequence(
            np.concatenate([before, rng.integers(1, 500, n)]).astype(np.int32), prompt
        )
        for n in (chosen, rejected)
    )
    return EncodedPair(first, second)


def split_pairs(pairs: Sequence[Pair], fraction: float, seed: int) -> tuple[list, list]:
    """(training pairs, held-out pairs) as `held_out` divides them, each in the data's order."""
    held = held_out((prompt_text(pair).encode() for pair in pairs), fraction, seed)
    ordered = sorted(zip(held, pairs, strict=True), key=lambda both: both[1].index)
    return [p for is_held, p in ordered if not is_held], [p for is_held, p in ordered if is_held]


def system(content: Any) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def some_pairs(count: int = 12) -> list[dict[str, Any]]:
    """String records of different lengths."""
    words = _TEXT[0].split()[:14]
    return [
        {
            "prompt": f"Question {i}: {' '.join(words[: 1 + i % 5])}?",
            "chosen": " ".join(words[i % 4 : 3 + i % 9]) + ".",
            "rejected": " ".join(words[: 2 + (5 * i) % 11][::-1]) + "!",
        }
        for i in range(count)
    ]
