"""Encode pairs as tokens: what the model reads, and which of it is scored.

The rules (compat: official has its own, see `official`):
- The chat template writes each whole conversation, and the prompt alone with its generation prompt.
  What it writes of itself between that and the response's own text (an empty think block, the name
  of a channel) counts as prompt (see `boundary`). Scoring starts at the end of the longest token
  prefix that this prompt, the chosen and the rejected conversation share. So the prompt and the
  assistant's header are not scored; and where the tokenizer merges the end of the prompt with the
  start of a response, the merged token is.
- If the template writes something else before each response, because only one has thinking, scoring
  starts in each at the end of the token prefix that it shares with its own prompt.
- There is exactly one BOS if the tokenizer adds one, and none otherwise.
- The end-of-turn token is scored; what a template writes after it is dropped. EOS is appended where
  a template writes no end-of-turn token, and to plain text.
- A pair that is too long loses prompt tokens from the left, keeping BOS: as many as necessary, but
  not below max_prompt_length. Then the responses lose tokens from the right.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..config.simpo_config import DataConfig
from ..errors import SimPOError
from .boundary import Boundary, BoundaryFinder
from .dropped import Dropped, dropped_parts
from .messages import as_messages, with_joined_parts
from .official import official_tokens
from .pairs import Quarantined
from .records import Pair
from .render import Renderer, token_ids
from .rows import InvalidRecordError, Message
from .special_tokens import SpecialTokens
from .truncation import Sequences, truncate


class TokenizedSequence(NamedTuple):
    """A prompt with one response: int32 token ids [T], scored from index ``score_start`` (≥ 1)."""

    tokens: np.ndarray
    score_start: int

    @property
    def num_scored(self) -> int:
        """|y| in the paper's loss, the number of scored tokens."""
        return len(self.tokens) - self.score_start


@dataclass(frozen=True)
class EncodedPair:
    """A pair as tokens.

    Attributes:
        chosen, rejected: the two sequences.
        index: row number in the source, from 0.
        source: "file:line".
        boundary_tokens: tokens at the end of the prompt that are scored, because the tokenizer
            merges them with the start of a response.
        cut_prompt: prompt tokens that were cut to fit max_length.
        cut_response: response tokens that were cut, of both responses together.
        template_tokens: tokens before the scored ones that the template writes after the generation
            prompt; of the sequence that has more of them.
        dropped: what the template does not write of the pair, see `dropped.Dropped`.
    """

    chosen: TokenizedSequence
    rejected: TokenizedSequence
    index: int = 0
    source: str = ""
    boundary_tokens: int = 0
    cut_prompt: int = 0
    cut_response: int = 0
    template_tokens: int = 0
    dropped: int = 0

    @property
    def length(self) -> int:
        """Tokens of the longer sequence."""
        return max(len(self.chosen.tokens), len(self.rejected.tokens))


class Encoder:
    """Encodes pairs by this module's rules, or by those of the official implementation.

    Args:
        tokenizer: mlx-lm's, which wraps transformers' own.
        config: chat_template, template_args, score, compat, max_length and max_prompt_length are
            read.

    Attributes:
        renderer: writes conversations with the chat template.
        special: puts BOS and EOS around sequences.

    Raises:
        SimPOError: the template cannot be read, or compat is "official" and the tokenizer lacks
            something that the official code needs.
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        """See the class; raises SimPOError."""
        self.tokenizer = tokenizer
        self.config = config
        self.renderer = Renderer(tokenizer, config.chat_template, config.template_args)
        self._boundaries = BoundaryFinder(
            self.renderer, after_thinking=config.score == "after_thinking"
        )
        self.special = SpecialTokens(tokenizer)
        has_required = {
            "chat template": not self.renderer.is_plain_text,
            "BOS token": tokenizer.bos_token_id is not None,
            "EOS token": self.special.eos is not None,
        }
        missing = [name for name, has_it in has_required.items() if not has_it]
        if config.compat == "official" and missing:
            raise SimPOError(
                f"data.compat is 'official', but this tokenizer has no {missing[0]}, which the "
                "official code needs; remove data.compat"
            )

    def encode(self, pair: Pair) -> EncodedPair:
        """Encode one pair.

        Raises:
            InvalidRecordError: the template rejects it or writes nothing of a response, no response
                token is left to score, or both sequences are the same.
            SimPOError: the pair is a conversation but there is no chat template.
        """
        if self.config.compat == "official":
            sequences, cuts, boundary_tokens = official_tokens(
                self.tokenizer,
                self.renderer,
                pair,
                max_length=self.config.max_length,
                max_prompt_length=self.config.max_prompt_length,
            )
            start = _Start(boundary_tokens, 0, self._dropped_parts(pair))
        else:
            whole, start = self._pair_tokens(pair)
            sequences, cuts = truncate(
                whole,
                self.config.max_length,
                self.config.max_prompt_length,
                self.tokenizer.bos_token_id,
            )
        if any(start >= len(tokens) for tokens, start in sequences):
            raise InvalidRecordError(
                "no scored tokens left", "data.max_length or the chat template leaves none"
            )
        if sequences[0][0] == sequences[1][0]:
            thinking = " without the thinking, which the chat template drops"
            is_cause = Dropped.THINKING in Dropped(start.dropped)
            raise InvalidRecordError(
                "identical responses",
                "after tokenization and truncation" + (thinking if is_cause else ""),
            )
        chosen, rejected = (
            TokenizedSequence(np.array(tokens, np.int32), start) for tokens, start in sequences
        )
        return EncodedPair(
            chosen,
            rejected,
            pair.index,
            pair.source,
            start.boundary_tokens,
            *cuts,
            start.template_tokens,
            int(start.dropped),
        )

    def prompt_tokens(self, prompt: str | list[Message], tools: list | None = None) -> list[int]:
        """Return what the model reads before it responds to ``prompt`` (user text, or messages).

        Raises:
            InvalidRecordError: the template rejects it, or it is not valid Unicode.
        """
        if self.renderer.is_plain_text and isinstance(prompt, str):
            return self.special.with_bos(self._ids(prompt))
        messages = with_joined_parts(as_messages(prompt, "user"))
        text = self.renderer.render(messages, tools, generation=True)
        return self.special.with_bos(self._ids(text))

    def _ids(self, text: str) -> list[int]:
        return token_ids(self.tokenizer, text)

    def _pair_tokens(self, pair: Pair) -> tuple[Sequences, "_Start"]:
        """Return both whole sequences, with where their scoring starts."""
        if self.renderer.is_plain_text and isinstance(pair.prompt, str):
            texts = (f"{pair.prompt}{response}" for response in (pair.chosen, pair.rejected))
            chosen, rejected = (
                self.special.with_eos(self.special.with_bos(self._ids(t))) for t in texts
            )
            prompt = self.prompt_tokens(pair.prompt)
            at = score_start(prompt, chosen, rejected)
            start = _Start(max(0, len(prompt) - at), 0, Dropped(0))
            return ((chosen, at), (rejected, at)), start
        prompt, *responses = self.renderer.conversation(pair)
        prompt_text = self.renderer.render(prompt, pair.tools, generation=True)
        boundaries, tokens, dropped = [], [], Dropped(0)
        for response in responses:
            text = self.renderer.render(prompt + response, pair.tools)
            tokens.append(self.special.end_turn(self.special.with_bos(self._ids(text))))
            boundary = self._boundaries.boundary(prompt, response, pair.tools, prompt_text, text)
            boundaries.append(boundary)
            dropped |= dropped_parts(self.renderer, prompt, response, pair.tools, text)
            dropped |= Dropped(0) if boundary.continues_prompt else Dropped.PROMPT
        return self._divided(prompt_text, boundaries, tokens, dropped)

    def _divided(
        self,
        prompt_text: str,
        boundaries: list[Boundary],
        tokens: list[list[int]],
        dropped: Dropped,
    ) -> tuple[Sequences, "_Start"]:
        """Return both conversations' tokens with where their scoring starts.

        Args:
            prompt_text: with its generation prompt. boundaries: of the two conversations' texts.

        Raises:
            InvalidRecordError: the template writes nothing of a response.
        """
        texts = [boundary.unscored for boundary in boundaries]
        before = {text: self.special.with_bos(self._ids(text)) for text in {prompt_text, *texts}}
        if texts[0] == texts[1]:
            starts = [score_start(before[texts[0]], *tokens)] * 2
        else:
            starts = [score_start(before[t], s) for t, s in zip(texts, tokens, strict=True)]
        prompt = before[prompt_text]
        # As many tokens as the prompt has that are scored, or that follow it and are not.
        boundary_tokens = template_tokens = 0
        for start, sequence, boundary in zip(starts, tokens, boundaries, strict=True):
            if boundary.continues_prompt:
                boundary_tokens = max(boundary_tokens, len(prompt) - start)
            if boundary.template_text:
                after_prompt = start - common_prefix(prompt, sequence)
                template_tokens = max(template_tokens, after_prompt)
        for name, sequence, start in zip(("chosen", "rejected"), tokens, starts, strict=True):
            # Otherwise the model would learn to say nothing, or not to.
            if self.special.is_empty(sequence[start:]):
                after = "" if self.config.score == "all" else " after its thinking"
                detail = f"the chat template writes nothing of {name}{after}"
                raise InvalidRecordError("empty response", detail)
        start = _Start(boundary_tokens, template_tokens, dropped)
        return ((tokens[0], starts[0]), (tokens[1], starts[1])), start

    def _dropped_parts(self, pair: Pair) -> Dropped:
        """Return what the template does not write of a pair that it writes in parts."""
        prompt, *responses = self.renderer.conversation(pair)
        dropped = Dropped(0)
        for response in responses:
            dropped |= dropped_parts(self.renderer, prompt, response, pair.tools)
        return dropped


class _Start(NamedTuple):
    """What stands before the responses of a pair: see `EncodedPair`."""

    boundary_tokens: int
    template_tokens: int
    dropped: Dropped


def score_start(*sequences: Sequence[int]) -> int:
    """Return where scoring starts: after the `common_prefix`, but not before index 1, because the
    first token has no predecessor that would predict it."""
    return max(1, common_prefix(*sequences))


def common_prefix(*sequences: Sequence[int]) -> int:
    """Return the length of the longest prefix that all sequences share."""
    shared = 0
    for items in zip(*sequences, strict=False):
        if len(set(items)) > 1:
            break
        shared += 1
    return shared


def encode_pairs(
    encoder: Encoder, pairs: Iterable[Pair], advance: Callable[[], None] = lambda: None
) -> tuple[list[EncodedPair], list[Quarantined]]:
    """Return (encoded pairs, quarantined pairs); ``advance`` is called after each pair.

    Raises:
        SimPOError: a pair is a conversation but there is no chat template.
    """
    encoded, quarantined = [], []
    for pair in pairs:
        try:
            encoded.append(encoder.encode(pair))
        except InvalidRecordError as error:
            quarantined.append(Quarantined(pair.source, *error.args))
        advance()
    return encoded, quarantined
