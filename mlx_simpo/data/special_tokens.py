"""The special tokens around a sequence: exactly one BOS, one token that ends the turn."""

from typing import Any

MAX_EMPTY = 4  # tokens


class SpecialTokens:
    """Puts special tokens around sequences, as a tokenizer has them.

    Args:
        tokenizer: mlx-lm's, which wraps transformers' own.

    Attributes:
        ends: ids of all tokens that end a turn.
        bos: [id] of the BOS token if the tokenizer adds one, else [].
        eos: id of the EOS token, or None.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Special tokens have three sources: transformers' named ones, mlx-lm's from the generation
        # config, and added tokens that are marked as special in tokenizer.json alone.
        self.ends = set(tokenizer.all_special_ids)
        self.ends |= set(tokenizer.eos_token_ids)
        self.ends |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        self.eos = tokenizer.eos_token_id
        # Whether it adds BOS cannot be read off a tokenizer's settings: they differ by class.
        first = tokenizer.encode("a", add_special_tokens=True)[:1]
        self.bos = first if first == [tokenizer.bos_token_id] else []

    def with_bos(self, tokens: list[int]) -> list[int]:
        """Return ``tokens`` with BOS first, if the tokenizer adds one and it is not there yet."""
        # A template may write white space before its BOS, as some files begin with a newline.
        first = next((i for i, t in enumerate(tokens) if not self._is_space(t)), 0)
        return tokens if tokens[first : first + 1] == self.bos else self.bos + tokens

    def with_eos(self, tokens: list[int]) -> list[int]:
        """Return ``tokens`` with EOS last, if there is one."""
        return tokens if self.eos is None or tokens[-1:] == [self.eos] else [*tokens, self.eos]

    def end_turn(self, tokens: list[int]) -> list[int]:
        """Return ``tokens`` up to the end-of-turn token, or with EOS if the template wrote none."""
        end = len(tokens)
        while end and tokens[end - 1] not in self.ends and self._is_space(tokens[end - 1]):
            end -= 1
        if end and tokens[end - 1] in self.ends:
            return tokens[:end]
        return self.with_eos(tokens)

    def is_empty(self, response: list[int]) -> bool:
        """Return whether a response is only tokens that end a turn, and white space."""
        # Decoding takes as long as all else, and a response that says nothing is short.
        return 0 < len(response) <= MAX_EMPTY and all(
            token in self.ends or self._is_space(token) for token in response
        )

    def _is_space(self, token: int) -> bool:
        return not self._tokenizer.decode([token]).strip()
