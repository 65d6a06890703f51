"""Responses to a few prompts, before and during a training: stored, shown and measured."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.nn as nn

from ..data.encode import Encoder
from ..reporting.advice import COLLAPSE_REMEDY
from .generate import generate_response
from .prompts import named, prompt_tokens
from .repetition import repeated_share
from .settings import SamplingSettings

MOST_REPEATED = 0.5


@dataclass(frozen=True)
class Sample:
    """One response of the model.

    tokens: its length. is_complete: the model ended it, not the maximum length. repetition: the
    share of its 4-grams of tokens that occurred before (`repetition.repeated_share`).
    """

    prompt: str
    response: str
    tokens: int
    is_complete: bool
    repetition: float

    @property
    def is_degenerate(self) -> bool:
        """Whether the response goes on to the maximum length and repeats itself."""
        return not self.is_complete and self.repetition > MOST_REPEATED

    def as_dict(self) -> dict[str, Any]:
        """Return the sample as JSON values."""
        return asdict(self)


def sample_responses(
    model: nn.Module, tokenizer: Any, encoder: Encoder, prompts: Sequence[str], max_tokens: int
) -> list[Sample]:
    """Generate a response to each prompt by greedy decoding, as the command generate does.

    The model's mode is left as it was, and MLX's random state as well, because greedy decoding
    draws nothing: a training goes on as if nothing had been generated.

    Raises:
        SimPOError: a prompt is empty, the template rejects it, or ``max_tokens`` is below 1.
    """
    settings = SamplingSettings(max_tokens)
    settings.check()
    encoded = [prompt_tokens(encoder, prompt) for prompt in named(prompts)]
    was_training = model.training
    model.eval()  # without LoRA dropout
    try:
        return [
            _sample(model, tokenizer, prompt, tokens, settings)
            for prompt, tokens in zip(prompts, encoded, strict=True)
        ]
    finally:
        model.train(was_training)


def _sample(
    model: nn.Module, tokenizer: Any, prompt: str, tokens: list[int], settings: SamplingSettings
) -> Sample:
    response = generate_response(model, tokenizer, tokens, settings)
    length, repetition = len(response.tokens), repeated_share(response.tokens)
    return Sample(prompt, response.text, length, response.is_complete, repetition)


def sample_warning(before: Sequence[Sample], now: Sequence[Sample]) -> str | None:
    """Warn if most responses go on to the maximum length and repeat themselves, and more than
    before training; None otherwise."""
    earlier, count = (sum(sample.is_degenerate for sample in part) for part in (before, now))
    if count <= len(now) / 2 or count <= earlier:
        return None
    return (
        f"{count} of {len(now)} sample responses repeat themselves up to the maximum length "
        f"(before training {earlier}); the model is degenerating: {COLLAPSE_REMEDY}"
    )
