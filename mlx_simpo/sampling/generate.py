"""Generation of one response with mlx_lm, from a prompt as in training."""

from typing import Any

import mlx.nn as nn
from mlx_lm import generate

from ..data.encode import Encoder
from ..data.rows import InvalidRecordError
from ..engine.vocabulary import check_prompt_ids
from ..errors import SimPOError


def generate_response(
    model: nn.Module, tokenizer: Any, encoder: Encoder, prompt: str, max_tokens: int = 200
) -> str:
    """Generate the model's response to one user turn by greedy decoding.

    The prompt gets the same template and BOS token as in training.

    Raises:
        SimPOError: the prompt is empty, has tokens that the model does not have, or is rejected by
            the template; or ``max_tokens`` is below 1.
    """
    check_max_tokens(max_tokens)
    tokens = prompt_tokens(encoder, prompt)
    check_prompt_ids(tokens, model)
    was_training = model.training
    model.eval()  # without LoRA dropout
    try:
        return generate(model, tokenizer, tokens, max_tokens=max_tokens).strip()
    finally:
        model.train(was_training)


def prompt_tokens(encoder: Encoder, prompt: str) -> list[int]:
    """Return the tokens of one user turn, with the template and BOS token of training.

    Raises:
        SimPOError: the prompt is empty, or the template rejects it.
    """
    try:
        tokens = encoder.prompt_tokens(prompt)
    except InvalidRecordError as error:
        raise SimPOError(f"the prompt cannot be used: {': '.join(error.args)}") from None
    if not tokens:  # plain text without a BOS token
        raise SimPOError("the prompt is empty; it must have at least one token")
    return tokens


def check_max_tokens(max_tokens: int) -> None:
    """Check the maximum length of a response.

    Raises:
        SimPOError: it is below 1.
    """
    if max_tokens < 1:
        raise SimPOError(f"max_tokens is {max_tokens}; it must be 1 or greater")
