"""Encode pairs as tokens: what the model reads, and which of it is scored.

The rules (compat: official has its own, see `official`):
- The chat template writes each whole conversation, and the prompt alone with its generation prompt.
  Scoring starts at the end of the longest token prefix that the prompt, the chosen and the rejected
  conversation share. So the prompt and the assistant's header are not scored; and where the
  tokenizer merges the end of the prompt with the start of a response, the merged token is.
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
from .official import official_tokens
from .pairs import Quarantined
from .records import Pair, as_messages
from .render import Renderer, token_ids
from .rows import InvalidRecordError, Message


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
    """

    chosen: TokenizedSequence
    rejected: TokenizedSequence
    index: int = 0
    source: str = ""
    boundary_tokens: int = 0
    cut_prompt: int = 0
    cut_response: int = 0

    @property
    def length(self) -> int:
        """Tokens of the longer sequence."""
        return max(len(self.chosen.tokens), len(self.rejected.tokens))


class Encoder:
    """Encodes pairs by this module's rules, or by those of the official implementation.

    Args:
        tokenizer: mlx-lm's or transformers' tokenizer.
        config: chat_template, compat, max_length and max_prompt_length are read.

    Attributes:
        renderer: writes conversations with the chat template.
        end_tokens: ids of all tokens that end a turn.
        bos: [id] of the BOS token if the tokenizer adds one, else [].
        eos: id of the EOS token, or None.

    Raises:
        SimPOError: the template cannot be read, or compat is "official" and the tokenizer lacks
            something that the official code needs.
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        """See the class; raises SimPOError."""
        self.tokenizer = tokenizer
        self.config = config
        self.renderer = Renderer(tokenizer, config.chat_template)
        # Special tokens have three sources: transformers' named ones, mlx-lm's from the generation
        # config, and added tokens that are marked as special in tokenizer.json alone.
        self.end_tokens = set(tokenizer.all_special_ids)
        self.end_tokens |= set(getattr(tokenizer, "eos_token_ids", ()))
        self.end_tokens |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.eos = tokenizer.eos_token_id
        # Whether it adds BOS cannot be read off a tokenizer's settings: they differ by class.
        with_special = tokenizer.encode("a", add_special_tokens=True)
        adds_bos = with_special[:1] == [tokenizer.bos_token_id] != self._ids("a")[:1]
        self.bos = [tokenizer.bos_token_id] if adds_bos else []
        has_required = {
            "chat template": not self.renderer.is_plain_text,
            "BOS token": tokenizer.bos_token_id is not None,
            "EOS token": self.eos is not None,
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
            InvalidRecordError: the template rejects it, no response token is left to score, or both
                sequences are the same.
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
        else:
            prompt, chosen, rejected = self._pair_tokens(pair)
            # At least 1: the first token has no predecessor that would predict it.
            start = max(1, common_prefix(prompt, chosen, rejected))
            boundary_tokens = max(0, len(prompt) - start)
            sequences, cuts = self._truncate(((chosen, start), (rejected, start)))
        if any(start >= len(tokens) for tokens, start in sequences):
            raise InvalidRecordError(
                "no scored tokens left", "data.max_length or the chat template leaves none"
            )
        if sequences[0] == sequences[1]:
            raise InvalidRecordError("identical responses", "after tokenization and truncation")
        chosen, rejected = (
            TokenizedSequence(np.array(tokens, np.int32), start) for tokens, start in sequences
        )
        return EncodedPair(chosen, rejected, pair.index, pair.source, boundary_tokens, *cuts)

    def prompt_tokens(self, prompt: str | list[Message], tools: list | None = None) -> list[int]:
        """Return what the model reads before it responds to ``prompt`` (user text, or messages).

        Raises:
            InvalidRecordError: the template rejects it, or it is not valid Unicode.
        """
        if self.renderer.is_plain_text and isinstance(prompt, str):
            return self._with_bos(self._ids(prompt))
        text = self.renderer.render(as_messages(prompt, "user"), tools, generation=True)
        return self._with_bos(self._ids(text))

    def _ids(self, text: str) -> list[int]:
        return token_ids(self.tokenizer, text)

    def _pair_tokens(self, pair: Pair) -> tuple[list[int], list[int], list[int]]:
        """Return tokens of (prompt with generation prompt, whole chosen, whole rejected)."""
        if self.renderer.is_plain_text and isinstance(pair.prompt, str):
            texts = (f"{pair.prompt}{response}" for response in (pair.chosen, pair.rejected))
            chosen, rejected = (self._with_eos(self._with_bos(self._ids(t))) for t in texts)
            return self.prompt_tokens(pair.prompt), chosen, rejected
        prompt, *responses = self.renderer.conversation(pair)
        texts = (self.renderer.render(prompt + response, pair.tools) for response in responses)
        chosen, rejected = (self._end_turn(self._with_bos(self._ids(text))) for text in texts)
        return self.prompt_tokens(prompt, pair.tools), chosen, rejected

    def _with_bos(self, tokens: list[int]) -> list[int]:
        # A template may write white space before its BOS, as some files begin with a newline.
        first = next((i for i, t in enumerate(tokens) if not self._is_space(t)), 0)
        return tokens if tokens[first : first + 1] == self.bos else self.bos + tokens

    def _with_eos(self, tokens: list[int]) -> list[int]:
        return tokens if self.eos is None or tokens[-1:] == [self.eos] else [*tokens, self.eos]

    def _end_turn(self, tokens: list[int]) -> list[int]:
        """Return ``tokens`` up to the end-of-turn token, or with EOS if the template wrote none."""
        end = len(tokens)
        while end and tokens[end - 1] not in self.end_tokens and self._is_space(tokens[end - 1]):
            end -= 1
        if end and tokens[end - 1] in self.end_tokens:
            return tokens[:end]
        return self._with_eos(tokens)

    def _is_space(self, token: int) -> bool:
        return not self.tokenizer.decode([token]).strip()

    def _truncate(self, sequences: tuple) -> tuple[tuple, tuple[int, int]]:
        """Return the two (tokens, start) cut to max_length, and how many tokens of (prompt,
        responses) were cut."""
        tokens, start = sequences[0]
        longest_response = max(len(tokens) - start for tokens, _ in sequences)
        excess = start + longest_response - self.config.max_length
        if excess <= 0:
            return sequences, (0, 0)
        cut = min(excess, max(0, start - self.config.max_prompt_length))
        bos = 1 if cut and tokens[0] == self.tokenizer.bos_token_id else 0
        start -= cut
        uncut = [tokens[:bos] + tokens[bos + cut :] for tokens, _ in sequences]
        short = [tokens[: self.config.max_length] for tokens in uncut]
        cut_response = sum(map(len, uncut)) - sum(map(len, short))
        return tuple((tokens, start) for tokens in short), (cut, cut_response)


def common_prefix(*sequences: Sequence[int]) -> int:
    """Return the length of the longest prefix that all sequences share."""
    shared = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
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
