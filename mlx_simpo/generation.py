"""One answer of a model, by mlx_lm's generation, on the prompt that training used."""

from typing import Any

import mlx.nn as nn
from mlx_lm import generate

from .data.encode import Encoder


def answer(
    model: nn.Module, tokenizer: Any, encoder: Encoder, prompt: str, max_tokens: int = 200
) -> str:
    """The model's most likely answer (greedy) to one user turn.

    The prompt goes through the same template and BOS rule as in training.
    """
    was_training = model.training
    model.eval()
    try:
        tokens = encoder.prompt_tokens(prompt)
        return generate(model, tokenizer, tokens, max_tokens=max_tokens).strip()
    finally:
        model.train(was_training)
