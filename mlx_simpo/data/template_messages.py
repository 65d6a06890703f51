"""What a user should know about a chat template and a dataset: what it adds, and what it drops."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from .boundary import Boundary, BoundaryFinder, common_start
from .dropped import Dropped
from .encode import EncodedPair, Encoder
from .render import Renderer
from .rows import InvalidRecordError, Message
from .template_args import describe_arguments
from .tokens import column

OTHER_TEMPLATE = "use a template that writes them (data.chat_template=FILE)"
# What is wrong with so many pairs, and what to do. PROMPT is in `_prompt_warning`.
WARNINGS = {
    Dropped.TOOLS: (
        "the chat template does not write the tools of {pairs}: the model will not see them",
        f"{OTHER_TEMPLATE}, or remove the tools from the data",
    ),
    Dropped.TOOL_CALLS: (
        "the chat template does not write the tool calls of {pairs} with function and arguments: "
        "the model will neither see nor learn them",
        f"{OTHER_TEMPLATE}, or remove these pairs from the data",
    ),
    Dropped.SYSTEM: (
        "the chat template does not write the system text of {pairs}: the model will not see it",
        "move the text into the first user turn, or use a template that writes it "
        "(data.chat_template=FILE)",
    ),
    Dropped.THINKING: (
        "the chat template does not write the thinking of the responses in {pairs}: the model will "
        "not learn it",
        "put it into the content, between the tags that the model uses, or use a template that "
        "writes it (data.chat_template=FILE)",
    ),
    Dropped.NULL_CONTENT: (
        "the chat template writes content that is null as a word (None or null) in {pairs}: the "
        "model will see and learn it",
        'write "" instead of null into the data, or use a template that knows null '
        "(data.chat_template=FILE)",
    ),
}


class TemplateMessages(NamedTuple):
    """Messages for the user: what is good to know, and what is probably a mistake."""

    notes: list[str]
    warnings: list[str]


def template_messages(encoder: Encoder, pairs: Sequence[EncodedPair]) -> TemplateMessages:
    """Return what to tell the user about the template's work on an encoded dataset.

    Of the pairs, columns are read, and one pair for each message.
    """
    notes = [note] if (note := _template_text_note(encoder, pairs)) else []
    return TemplateMessages(notes, list(_warnings(encoder, pairs)))


def _template_text_note(encoder: Encoder, pairs: Sequence[EncodedPair]) -> str | None:
    """Tell what the template writes before the responses, if it is not only white space."""
    counts = column(pairs, "template_tokens")
    examples: dict[str, str] = {}
    num_pairs = 0
    # Pairs with as many of these tokens have the same text, except in strange cases.
    values, first, times = np.unique(counts, return_index=True, return_counts=True)
    for value, index, number in zip(values.tolist(), first.tolist(), times.tolist(), strict=True):
        text = _template_text(encoder, pairs[index]) if value else ""
        if text.strip():
            examples[text] = pairs[index].source
            num_pairs += number
    if not examples:
        return None
    written = " or ".join(map(repr, examples))
    remedy = same_prompt_argument(encoder.renderer)
    advice = (
        f"set data.template_args.{describe_arguments(remedy)}, so that the model is prompted with "
        "it in evaluate and generate, too"
        if remedy
        else "no argument of the template prompts the model with it: it has to write it itself"
    )
    return (
        f"the chat template itself writes {written} before the responses of {num_pairs} of "
        f"{len(pairs)} pairs; it is not scored; {advice}"
    )


def _template_text(encoder: Encoder, pair: EncodedPair) -> str:
    """Return what the template writes between the generation prompt and a pair's response."""
    sequence = max(pair.chosen, pair.rejected, key=lambda sequence: sequence.score_start)
    first = max(0, sequence.score_start - pair.template_tokens)
    return encoder.tokenizer.decode(sequence.tokens[first : sequence.score_start].tolist())


def same_prompt_argument(renderer: Renderer) -> dict[str, bool]:
    """Return the argument with which the template writes nothing but white space between the
    generation prompt and a response; {} if there is none, or if it does so without arguments."""
    names = sorted(name for name in renderer.variables if "think" in name)
    values = [{}, *({name: value} for name in names for value in (False, True))]
    for arguments in values:
        text = text_after_prompt(renderer.with_arguments(arguments))
        if text is not None and not text.strip():
            return arguments
    return {}


def _plain_conversation(renderer: Renderer) -> tuple[Boundary, str] | None:
    """Return where the response of a plain conversation begins, and the prompt before it; None if
    the template rejects it."""
    prompt: list[Message] = [{"role": "user", "content": "a question"}]
    response: list[Message] = [{"role": "assistant", "content": "a response"}]
    try:
        prompt_text = renderer.render(prompt, generation=True)
        text = renderer.render(prompt + response)
    except InvalidRecordError:
        return None
    finder = BoundaryFinder(renderer)
    return finder.boundary(prompt, response, None, prompt_text, text), prompt_text


def missing_in_training(renderer: Renderer) -> str:
    """Return what the prompt of a plain conversation ends with that is not there in training."""
    plain = _plain_conversation(renderer)
    if plain is None:
        return ""
    boundary, prompt_text = plain
    return prompt_text[common_start(prompt_text, boundary.unscored) :]


def text_after_prompt(renderer: Renderer) -> str | None:
    """Return what the template writes between the generation prompt and a plain response.

    None if the response does not follow the generation prompt.
    """
    plain = _plain_conversation(renderer)
    return plain[0].template_text if plain and plain[0].continues_prompt else None


def _warnings(encoder: Encoder, pairs: Sequence[EncodedPair]) -> Iterator[str]:
    dropped = column(pairs, "dropped")
    for flag in Dropped:
        indices = np.flatnonzero(dropped & flag)
        if not len(indices):
            continue
        source = pairs[int(indices[0])].source
        count = f"{len(indices)} of {len(pairs)} pairs"
        if flag == Dropped.PROMPT:
            yield _prompt_warning(encoder.renderer, f"{count} (e.g. {source})")
        else:
            problem, remedy = WARNINGS[flag]
            yield f"{problem.format(pairs=f'{count} (e.g. {source})')}; {remedy}"


def _prompt_warning(renderer: Renderer, pairs: str) -> str:
    """Tell that the model is prompted differently than it is trained, with an example."""
    missing = missing_in_training(renderer)
    example = f": before a response there is no {missing!r}" if missing else ""
    remedy = same_prompt_argument(renderer)
    setting = f"set data.template_args.{describe_arguments(remedy)}, or " if remedy else ""
    return (
        f"the chat template writes the conversations of {pairs} differently than the prompt that "
        f"evaluate and generate give to the model{example}; the model learns from one and is asked "
        f"with the other: {setting}use a template that writes both alike (data.chat_template=FILE)"
    )
