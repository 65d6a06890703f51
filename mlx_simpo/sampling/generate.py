"""One answer of a model, by mlx_lm's generation, on the prompt that training used."""

from typing import Any

import mlx.nn as nn
from mlx_lm import generate

from ..data.encode import Encoder
from ..data.records import InvalidRecordError
from ..errors import SimPOError


def answer(
    model: nn.Module, tokenizer: Any, encoder: Encoder, prompt: str, max_tokens: int = 200
) -> str:
    """The model's most likely answer (greedy) to one user turn.

    The prompt goes through the same template and BOS rule as in training.

    Raises:
        SimPOError: the prompt is empty, the template refuses it, or ``max_tokens`` is below 1.
    """
    if max_tokens < 1:
        raise SimPOError(f"max_tokens is {max_tokens}; it must be 1 or greater")
    try:
        tokens = encoder.prompt_tokens(prompt)
    except InvalidRecordError as refusal:
        raise SimPOError(f"the prompt cannot be used: {': '.join(refusal.args)}") from None
    if not tokens:
        raise SimPOError("the prompt is empty; give the model at least a word")
    was_training = model.training
    model.eval()
    try:
        return generate(model, tokenizer, tokens, max_tokens=max_tokens).strip()
    finally:
        model.train(was_training)
