"""Responses to several prompts, of the base model and of an adapter, from the same weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import mlx.nn as nn

from ..data.encode import Encoder
from ..errors import SimPOError
from ..model.switch import AdapterSwitch
from .generate import Response, draw_seed, stream_response
from .prompts import (
    NamedPrompt,
    check_against_model,
    check_system_prompt,
    prompt_tokens,
    with_system_turn,
)
from .settings import SamplingSettings

Source = Literal["base", "adapter"]


class ResponsePart(NamedTuple):
    """What one token adds to one of the responses.

    Attributes:
        prompt: number of the prompt, from 0.
        source: whose response it is, "base" or "adapter".
        text: may be empty, while a character or a space is not complete.
        response: the whole response, in its last part.
    """

    prompt: int
    source: Source
    text: str
    response: Response | None = None


@dataclass(frozen=True)
class Responder:
    """A model that responds to prompts, in evaluation mode.

    Attributes:
        encoder: of the model's tokenizer, with the template of training. switch: of its adapter;
            None for a model without one.
    """

    model: nn.Module
    tokenizer: Any
    encoder: Encoder
    switch: AdapterSwitch | None = None

    def respond(
        self,
        prompts: Sequence[NamedPrompt],
        settings: SamplingSettings,
        *,
        system_prompt: str | None = None,
        base: bool = True,
    ) -> Iterator[ResponsePart]:
        """Return an iterator over the parts of all responses, prompt by prompt, the base model's
        before the adapter's.

        Both responses to a prompt have the same seed. With a seed in the settings it is that one
        for every prompt: a response does not depend on the others.

        Args:
            base: whether the base model responds beside an adapter.

        Raises:
            SimPOError: a setting or a prompt that cannot be used; it is raised by this call, before
                anything is generated.
        """
        settings.check()
        if not prompts:
            raise SimPOError("there are no prompts; name at least one")
        if self.switch is None and not base:
            raise SimPOError(
                "base is False and there is no adapter, so that nothing would respond; leave base "
                "out, or name an adapter"
            )
        if system_prompt is not None:
            check_system_prompt(self.encoder, system_prompt)
            prompts = [with_system_turn(prompt, system_prompt) for prompt in prompts]
        encoded = [prompt_tokens(self.encoder, prompt) for prompt in prompts]
        for tokens in encoded:
            check_against_model(tokens, settings, self.model)
        return self._parts(encoded, settings, base)

    def _parts(
        self, encoded: list[list[int]], settings: SamplingSettings, base: bool
    ) -> Iterator[ResponsePart]:
        for number, tokens in enumerate(encoded):
            seed = draw_seed() if settings.seed is None else settings.seed
            for source in self.sources(base=base):
                self.use(source)
                stream = stream_response(self.model, self.tokenizer, tokens, settings, seed=seed)
                for part in stream:
                    yield ResponsePart(number, source, part.text, part.response)

    def sources(self, *, base: bool = True) -> list[Source]:
        """Return whose responses there are to each prompt, in their order.

        Args:
            base: whether the base model responds beside an adapter.
        """
        responds: dict[Source, bool] = {"base": base, "adapter": self.switch is not None}
        return [source for source, does in responds.items() if does]

    def use(self, source: Source) -> None:
        """Let the base model or the adapter respond from now on."""
        if self.switch is not None:
            self.switch.set(source == "adapter")
