"""What a model reads before it responds: a prompt as tokens, with the template of training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.nn as nn

from ..data.dropped import Dropped, dropped_parts
from ..data.encode import Encoder
from ..data.messages import as_messages, check_messages, text_of, with_system_text
from ..data.rows import InvalidRecordError, Message
from ..engine.vocabulary import check_prompt_ids, vocabulary_size
from ..errors import SimPOError
from .settings import SamplingSettings

Prompt = str | list[Message]
_ENDS_A_PROMPT = ("user", "tool", "function")


class NamedPrompt(NamedTuple):
    """A prompt with what messages call it ("the prompt", "prompts.txt:3"), and tools for it."""

    prompt: Prompt
    name: str = "the prompt"
    tools: list | None = None


def named(prompts: Sequence[Prompt]) -> list[NamedPrompt]:
    """Return prompts with their numbers as names; a single one is "the prompt"."""
    if len(prompts) == 1:
        return [NamedPrompt(prompts[0])]
    return [NamedPrompt(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]


def last_text(prompt: Prompt) -> str:
    """Return the text that a model responds to: a prompt's, or that of its last message."""
    return prompt if isinstance(prompt, str) else text_of(prompt[-1].get("content"))


def check_prompt(prompt: Any, name: str = "the prompt") -> None:
    """Check that a prompt is text or messages that a model can respond to.

    Raises:
        SimPOError: it is neither, it is empty, or its last turn is the assistant's.
    """
    if isinstance(prompt, str):
        last = prompt
    elif isinstance(prompt, list):
        try:
            check_messages("prompt", prompt)
        except InvalidRecordError as error:
            raise SimPOError(f"{name} cannot be used: {': '.join(error.args)}") from None
        role = prompt[-1]["role"] if prompt else None
        if role is not None and role not in _ENDS_A_PROMPT:
            raise SimPOError(
                f"{name} ends with a turn of the {role}; it must end with the user's, to which the "
                "model responds"
            )
        last = text_of(prompt[-1].get("content")) if prompt else ""
    else:
        raise SimPOError(f"{name} must be text or a list of messages, not {str(prompt)[:60]}")
    if not last.strip():
        raise SimPOError(f"{name} is empty; write what the model should respond to")


def prompt_tokens(encoder: Encoder, prompt: NamedPrompt) -> list[int]:
    """Return the tokens of a prompt, with the template and BOS token of training.

    Raises:
        SimPOError: the prompt is invalid (see `check_prompt`), the template rejects it, or it is a
            conversation and there is no template.
    """
    check_prompt(prompt.prompt, prompt.name)
    if not isinstance(prompt.prompt, str) and encoder.renderer.is_plain_text:
        raise SimPOError(
            f"{prompt.name} is a conversation, and the chat template is "
            f"{encoder.renderer.origin}; use plain text, or set data.chat_template to a template "
            "file"
        )
    try:
        tokens = encoder.prompt_tokens(prompt.prompt, prompt.tools)
    except InvalidRecordError as error:
        raise SimPOError(f"{prompt.name} cannot be used: {': '.join(error.args)}") from None
    if not tokens:
        raise SimPOError(f"the chat template leaves nothing of {prompt.name}; use another template")
    return tokens


def with_system_turn(prompt: NamedPrompt, text: str) -> NamedPrompt:
    """Return a prompt with a system turn in front.

    Raises:
        SimPOError: it has another system turn.
    """
    try:
        return prompt._replace(prompt=with_system_text(as_messages(prompt.prompt, "user"), text))
    except InvalidRecordError:
        raise SimPOError(
            f"{prompt.name} has a system turn of its own, and there is another system prompt; "
            "leave one of them out"
        ) from None


def check_system_prompt(encoder: Encoder, text: str) -> None:
    """Check that the chat template writes system turns.

    Raises:
        SimPOError: it rejects them or leaves them out, there is no template, or the text is empty.
    """
    if not text.strip():
        raise SimPOError("the system prompt is empty; write one, or leave it out")
    remedy = "leave it out, or put its text into the prompt"
    if encoder.renderer.is_plain_text:
        raise SimPOError(
            "a system prompt needs a chat template, and the one in use is "
            f"{encoder.renderer.origin}; {remedy}"
        )
    messages = as_messages(with_system_turn(NamedPrompt("Hello"), text).prompt, "user")
    try:
        dropped = dropped_parts(encoder.renderer, messages, [], None)
    except InvalidRecordError as error:
        raise SimPOError(
            f"the system prompt cannot be used: {': '.join(error.args)}; {remedy}"
        ) from None
    if Dropped.SYSTEM in dropped:
        raise SimPOError(
            f"the chat template drops system prompts, so that the model would not see it; {remedy}"
        )


def check_against_model(tokens: list[int], settings: SamplingSettings, model: nn.Module) -> None:
    """Check the tokens of a prompt and top_k against the model's vocabulary.

    Raises:
        SimPOError: a token is not in it, or it has not more tokens than ``top_k``.
    """
    check_prompt_ids(tokens, model)
    size = vocabulary_size(model)
    if settings.top_k >= size:
        raise SimPOError(
            f"top_k is {settings.top_k}; it must be less than the {size} tokens of the model's "
            "vocabulary (0: all tokens)"
        )
