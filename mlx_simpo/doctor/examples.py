"""What the engines are tried on: a model with LoRA attached, and pairs of tokens."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models import llama, qwen3_5

from ..config.simpo_config import SimPOConfig, TrainConfig
from ..data.encode import EncodedPair, encode_pairs
from ..engine.trial_shapes import random_pairs
from ..errors import SimPOError
from ..model.loading import dtype_of
from ..model.lora import attach_lora
from ..reporting.display import Display
from ..training.datasets import create_encoder
from ..training.session import load_base_model
from .operations import DELTA_SIZE, delta_heads
from .texts import PAIRS

# Heads of 64, as in most models below 2 billion parameters; as wide as a test of seconds allows.
_LLAMA = {
    "model_type": "llama",
    "hidden_size": 384,
    "num_hidden_layers": 4,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "vocab_size": 8192,
    "tie_word_embeddings": True,
}
# (prompt, chosen, rejected), in tokens.
_LENGTHS = ((24, 60, 40), (48, 30, 90), (130, 100, 60), (160, 24, 32))
# mlx-lm's loop over tokens keeps a state for each: it needs a lot of memory.
_SHORT_LENGTHS = ((16, 30, 12), (48, 20, 32))


class Example(NamedTuple):
    """A model with LoRA attached, which is not zero, and pairs of tokens to train it on.

    name, model_type: of the model. is_random: whether it is one of ours and not a real model.
    config: the settings of a run in which one step takes all the pairs.
    """

    name: str
    model_type: str
    is_random: bool
    model: Any
    pairs: list[EncodedPair]
    config: SimPOConfig

    @property
    def tokens(self) -> int:
        """The tokens of both sequences of each pair, the prompt counted twice."""
        return sum(len(p.chosen.tokens) + len(p.rejected.tokens) for p in self.pairs)

    def describe_model(self) -> dict[str, Any]:
        """Return what the model is, for JSON."""
        return {
            "name": self.name,
            "model_type": self.model_type,
            "random": self.is_random,
            "layers": len(self.model.layers),
            "dtype": dtype_of(self.model),
        }

    def describe_pairs(self) -> dict[str, Any]:
        """Return what a step trains on, for JSON: "tokens" of all sequences, and the lengths."""
        lengths = [
            {
                "prompt": min(p.chosen.score_start, p.rejected.score_start),
                "chosen": p.chosen.num_scored,
                "rejected": p.rejected.num_scored,
            }
            for p in self.pairs
        ]
        return {"lora_rank": self.config.lora.rank, "tokens": self.tokens, "lengths": lengths}


def random_examples() -> Iterator[Example]:
    """Yield small random models in float32: a llama, and a hybrid that has the delta rule.

    One after the other, so that only one of them takes memory.
    """
    mx.random.seed(0)
    model: Any = llama.Model(llama.ModelArgs.from_dict(_LLAMA))
    yield _example("random llama", "llama", model, random_pairs(_LLAMA["vocab_size"], _LENGTHS))
    mx.random.seed(0)
    model = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(_hybrid()))
    yield _example(
        "random qwen3_5", "qwen3_5", model, random_pairs(_LLAMA["vocab_size"], _SHORT_LENGTHS)
    )


def _hybrid() -> dict[str, Any]:
    """Return the settings of a model of three layers with the delta rule and one with attention."""
    key_heads, heads = delta_heads()
    text = {
        **_LLAMA,
        "model_type": "qwen3_5_text",
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": DELTA_SIZE,
        "linear_value_head_dim": DELTA_SIZE,
    }
    return {"model_type": "qwen3_5", "text_config": text}


def loaded_example(name: str, display: Display) -> Example:
    """Load a model in its own dtype, and encode the built-in texts with its chat template.

    Args:
        name: Hub id or folder.

    Raises:
        SimPOError: it cannot be loaded, or its chat template rejects all of the built-in texts.
    """
    config = SimPOConfig(model=name)
    loaded = load_base_model(config, display)
    encoder = create_encoder(loaded.tokenizer, config, display)
    pairs, quarantined = encode_pairs(encoder, PAIRS)
    if not pairs:
        raise SimPOError(
            f"{name} cannot be trained on the built-in texts: {quarantined[0].reason} "
            f"({quarantined[0].detail}); please report this, and name another model"
        )
    model_type = str(loaded.config.get("model_type"))
    return _example(name, model_type, loaded.model, pairs, is_random=False)


def _example(
    name: str,
    model_type: str,
    model: nn.Module,
    pairs: Sequence[EncodedPair],
    *,
    is_random: bool = True,
) -> Example:
    # The learning rate is 0 in the first step of a warm-up and tiny after it: every step of every
    # variant is to compute the same.
    options = TrainConfig(
        batch_size=len(pairs), gradient_accumulation_steps=1, steps=1000, learning_rate=1e-12
    )
    config = SimPOConfig(model=name, train=options)
    attach_lora(model, config.lora, config.seed)
    # As attached, half of the LoRA weights are 0 and the gradients of the others with them.
    noise = tree_map(lambda p: p + 0.01 * mx.random.normal(p.shape), model.trainable_parameters())
    model.update(noise)
    model.eval()
    mx.eval(model.parameters())
    return Example(name, model_type, is_random, model, list(pairs), config)
