"""Pairs → tokens: what the model reads, and from which token on it is scored.

The rules (compat: official has its own, see `official`):
- The conversation is templated whole, the prompt alone with the generation prompt. Scoring begins
  at the end of the longest token prefix that the prompt, the whole chosen and the whole rejected
  conversation share: never inside the prompt, the assistant's header not scored, and right where a
  merge of the tokenizer crosses from prompt to answer.
- One BOS where the tokenizer wants one, never two.
- The end-of-turn token is scored, what a template writes after it is not even read. EOS is put
  where a template leaves no end-of-turn token, and after plain text.
- Too long: the prompt loses tokens on the left, keeping BOS, as many as are needed but not below
  max_prompt_length; then the answers lose tokens on the right.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..config.simpo_config import DataConfig
from ..errors import SimPOError
from .official import official_tokens
from .pairs import Quarantined
from .records import InvalidRecordError, Message, Pair, as_messages
from .render import Renderer, token_ids


class TokenizedSequence(NamedTuple):
    """One sequence: int32 token ids [T], of which those from ``score_start`` (≥ 1) on are scored."""

    tokens: np.ndarray
    score_start: int

    @property
    def num_scored(self) -> int:
        """|y|, the number of scored tokens."""
        return len(self.tokens) - self.score_start


@dataclass(frozen=True)
class EncodedPair:
    """A pair as tokens.

    boundary_tokens: tokens of the prompt that are scored because the tokenizer merges across the boundary.
    cut_prompt, cut_response: tokens that max_length took away (the answers' together).
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
    """Encodes pairs by the rules above, or by the official implementation's.

    Args:
        tokenizer: mlx-lm's or transformers' tokenizer.
        config: chat_template, compat, max_length and max_prompt_length are read.

    Raises:
        SimPOError: an unreadable template, or compat: official with a tokenizer that the official
            code cannot use.
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.renderer = Renderer(tokenizer, config.chat_template)
        self.stops = set(tokenizer.all_special_ids) | set(getattr(tokenizer, "eos_token_ids", ()))
        self.stops |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.eos = tokenizer.eos_token_id
        with_special = tokenizer.encode("a", add_special_tokens=True)
        adds_bos = with_special[:1] == [tokenizer.bos_token_id] != self._ids("a")[:1]
        # The BOS to put in front where the text has none: only if the tokenizer does so by itself.
        self.bos = [tokenizer.bos_token_id] if adds_bos else []
        needed = {
            "chat template": not self.renderer.plain,
            "BOS token": tokenizer.bos_token_id is not None,
            "EOS token": self.eos is not None,
        }
        lacking = [name for name, is_there in needed.items() if not is_there]
        if config.compat == "official" and lacking:
            raise SimPOError(
                f"data.compat is 'official', but this tokenizer has no {lacking[0]}, which the "
                "official code needs; leave data.compat out"
            )

    def encode(self, pair: Pair) -> EncodedPair:
        """The tokens of one pair.

        Raises:
            Refused: the template or the rules leave nothing to train on.
            SimPOError: the pair is a conversation but there is no chat template.
        """
        if self.config.compat == "official":
            encoded = official_tokens(
                self.tokenizer,
                self.renderer,
                pair,
                max_length=self.config.max_length,
                max_prompt_length=self.config.max_prompt_length,
            )
            sides, cuts, moved = encoded.sides, encoded.cuts, encoded.boundary_tokens
        else:
            prompt, chosen, rejected = self._texts(pair)
            start = max(1, common_prefix(prompt, chosen, rejected))
            sides = ((chosen, start), (rejected, start))
            moved = len(prompt) - start
            sides, cuts = self._truncate(sides)
        if any(start >= len(tokens) for tokens, start in sides):
            raise InvalidRecordError("no scored token left", "the prompt fills data.max_length")
        if sides[0] == sides[1]:
            raise InvalidRecordError("identical answers", "after tokenization and truncation")
        chosen, rejected = (
            TokenizedSequence(np.array(tokens, np.int32), start) for tokens, start in sides
        )
        return EncodedPair(chosen, rejected, pair.index, pair.source, max(0, moved), *cuts)

    def prompt_tokens(self, prompt: str | list[Message], tools: list | None = None) -> list[int]:
        """What the model reads before it answers ``prompt`` (one user turn, or messages)."""
        if self.renderer.plain and isinstance(prompt, str):
            return self._with_bos(self._ids(prompt))
        text = self.renderer.render(as_messages(prompt, "user"), tools, generation=True)
        return self._with_bos(self._ids(text))

    def _ids(self, text: str) -> list[int]:
        return token_ids(self.tokenizer, text)

    def _texts(self, pair: Pair) -> tuple[list[int], list[int], list[int]]:
        """Tokens of (prompt with generation prompt, whole chosen, whole rejected)."""
        if self.renderer.plain and isinstance(pair.prompt, str):
            texts = (f"{pair.prompt}{answer}" for answer in (pair.chosen, pair.rejected))
            chosen, rejected = (self._with_eos(self._with_bos(self._ids(t))) for t in texts)
            return self.prompt_tokens(pair.prompt), chosen, rejected
        before, *answers = self.renderer.conversation(pair)
        texts = (self.renderer.render(before + answer, pair.tools) for answer in answers)
        chosen, rejected = (self._end_turn(self._with_bos(self._ids(text))) for text in texts)
        return self.prompt_tokens(before, pair.tools), chosen, rejected

    def _with_bos(self, tokens: list[int]) -> list[int]:
        first = next((i for i, t in enumerate(tokens) if not self._is_space(t)), 0)
        return tokens if tokens[first : first + 1] == self.bos else self.bos + tokens

    def _with_eos(self, tokens: list[int]) -> list[int]:
        return tokens if self.eos is None or tokens[-1:] == [self.eos] else [*tokens, self.eos]

    def _end_turn(self, tokens: list[int]) -> list[int]:
        """``tokens`` up to the end-of-turn token; with EOS if the template wrote none."""
        end = len(tokens)
        while end and tokens[end - 1] not in self.stops and self._is_space(tokens[end - 1]):
            end -= 1
        if end and tokens[end - 1] in self.stops:
            return tokens[:end]
        return self._with_eos(tokens)

    def _is_space(self, token: int) -> bool:
        return not self.tokenizer.decode([token]).strip()

    def _truncate(self, sides: tuple) -> tuple[tuple, tuple[int, int]]:
        """``sides`` cut to max_length, and (prompt tokens, answer tokens) that were cut."""
        tokens, start = sides[0]
        longest = max(len(side) - start for side, _ in sides)
        excess = start + longest - self.config.max_length
        if excess <= 0:
            return sides, (0, 0)
        cut = min(excess, max(0, start - self.config.max_prompt_length))
        keep = 1 if cut and tokens[0] == self.tokenizer.bos_token_id else 0
        start -= cut
        whole = [side[:keep] + side[keep + cut :] for side, _ in sides]
        short = [side[: self.config.max_length] for side in whole]
        lost = sum(len(w) for w in whole) - sum(len(s) for s in short)
        return tuple((side, start) for side in short), (cut, lost)


def common_prefix(*sequences: Sequence[int]) -> int:
    """How many items all sequences begin with alike."""
    shared = 0
    for items in zip(*sequences, strict=False):
        if any(item != items[0] for item in items):
            break
        shared += 1
    return shared


def encode_pairs(
    encoder: Encoder, pairs: Iterable[Pair], advance: Callable[[], None] = lambda: None
) -> tuple[list[EncodedPair], list[Quarantined]]:
    """(pairs as tokens, pairs that the template or the rules refuse); ``advance`` is called after
    each."""
    encoded, refused = [], []
    for pair in pairs:
        try:
            encoded.append(encoder.encode(pair))
        except InvalidRecordError as refusal:
            refused.append(Quarantined(pair.source, *refusal.args))
        advance()
    return encoded, refused
