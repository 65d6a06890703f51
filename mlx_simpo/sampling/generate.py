"""Generate one response with mlx-lm, token by token, from a prompt as in training."""

import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import mlx.nn as nn
from mlx_lm import stream_generate
from mlx_lm.sample_utils import make_sampler

from ..randomness import seeded
from .settings import LARGEST_SEED, SamplingSettings

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Response:
    """A whole response.

    Attributes:
        text: without white space around it.
        tokens: their ids, without the one that ends the response.
        finish_reason: "stop" if the model ended it, "length" if it was cut at max_tokens.
        seed: of its random numbers; None for greedy decoding.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    seed: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether the model ended it, not the maximum length."""
        return self.finish_reason == "stop"

    def as_dict(self) -> dict[str, Any]:
        """Return text, number of tokens and reason of the end as JSON values."""
        counted = {"text": self.text, "tokens": len(self.tokens)}
        return counted | {"finish_reason": self.finish_reason}


class Part(NamedTuple):
    """What one token adds to a response.

    text: may be empty, while a character or a space is not complete. token: its id; the model has
    read it. response: in the last part, the whole response; its text is that of all parts.
    """

    text: str
    token: int
    response: Response | None = None


def stream_response(
    model: nn.Module,
    tokenizer: Any,
    tokens: list[int],
    settings: SamplingSettings,
    *,
    seed: int | None = None,
    prompt_cache: list[Any] | None = None,
    progress: Progress | None = None,
) -> Iterator[Part]:
    """Yield a response to ``tokens``, one part per token; it is what ``mlx_lm.generate`` returns
    with the same options, without white space around it.

    MLX's random state is put aside until the last part.

    Args:
        model: in evaluation mode. tokens: of the prompt; those that it has not read yet if there is
            a ``prompt_cache``, mlx-lm's. settings: checked; their seed is not used. seed: of the
            random numbers; not used in greedy decoding. progress: called with how many of the
            tokens have been read, and their number.
    """
    sampler = make_sampler(
        settings.temperature, top_p=settings.top_p, min_p=settings.min_p, top_k=settings.top_k
    )
    text = spaces = ""
    ids = []
    with nullcontext() if settings.is_greedy or seed is None else seeded(seed):
        for step in stream_generate(
            model,
            tokenizer,
            tokens,
            max_tokens=settings.max_tokens,
            sampler=sampler,
            prompt_cache=prompt_cache,
            prompt_progress_callback=progress,
        ):
            # White space is shown when text follows it: none begins or ends a response.
            piece = spaces + step.text if text else step.text.lstrip()
            shown = piece.rstrip()
            spaces = piece[len(shown) :]
            text += shown
            ids.append(step.token)
            response = None
            if step.finish_reason is not None:
                is_complete = step.finish_reason == "stop"
                response = Response(
                    text,
                    tuple(ids[:-1] if is_complete else ids),
                    "stop" if is_complete else "length",
                    None if settings.is_greedy else seed,
                )
            yield Part(shown, step.token, response)


def generate_response(
    model: nn.Module,
    tokenizer: Any,
    tokens: list[int],
    settings: SamplingSettings,
    *,
    seed: int | None = None,
) -> Response:
    """Generate a response to the tokens of a prompt; see `stream_response`."""
    *_, last = stream_response(model, tokenizer, tokens, settings, seed=seed)
    assert last.response is not None
    return last.response


def draw_seed() -> int:
    """Return a seed that nobody has chosen."""
    return random.SystemRandom().randint(0, LARGEST_SEED)
