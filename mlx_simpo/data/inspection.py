"""What a dataset holds and what will be trained on: counts, lengths, cuts, one pair as tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.text import Text

from ..errors import visible
from .dropped import Dropped
from .encode import EncodedPair, Encoder, TokenizedSequence
from .pairs import Quarantined, count_reasons
from .tokens import column, lengths

_UNKNOWN = "\ufffd"  # what is decoded from bytes that are no character
QUANTILES = {"min": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}


def summarize(
    pairs: Sequence[EncodedPair], quarantined: Sequence[Quarantined], encoder: Encoder
) -> dict[str, Any]:
    """Return counts and length quantiles of an encoded dataset, ready for JSON."""
    chosen, rejected = column(pairs, "chosen"), column(pairs, "rejected")
    prompts = column(pairs, "chosen_score_start")
    responses = {
        "chosen": chosen - prompts,
        "rejected": rejected - column(pairs, "rejected_score_start"),
    }
    token_counts = {"prompt": prompts, **responses, "longer sequence": lengths(pairs)}
    cut_prompt, cut_response = column(pairs, "cut_prompt"), column(pairs, "cut_response")
    return {
        "records": len(pairs) + len(quarantined),
        "pairs": len(pairs),
        "chat_template": encoder.renderer.origin,
        "quarantined": count_reasons(quarantined),
        "quarantined_records": [q._asdict() for q in quarantined],
        "prompts_cut": int(np.count_nonzero(cut_prompt)),
        "responses_cut": int(np.count_nonzero(cut_response)),
        "tokens_cut": _total(cut_prompt) + _total(cut_response),
        "boundary_merges": int(np.count_nonzero(column(pairs, "boundary_tokens"))),
        "template_text": int(np.count_nonzero(column(pairs, "template_tokens"))),
        "dropped": _count_flags(column(pairs, "dropped")),
        "tokens": _total(chosen) + _total(rejected),
        "scored_tokens": _total(responses["chosen"]) + _total(responses["rejected"]),
        "length_bias": length_bias(responses["chosen"], responses["rejected"]),
        "lengths": {
            name: {label: int(np.quantile(values, q)) for label, q in QUANTILES.items()}
            for name, values in token_counts.items()
        },
    }


def length_bias(chosen: np.ndarray, rejected: np.ndarray) -> dict[str, Any]:
    """Return how often the longer response is the preferred one.

    Args:
        chosen, rejected: scored tokens of each pair's responses, int [N].

    Returns:
        longer_chosen: share of the pairs with responses of different lengths, or None if there are
        none; pairs: number of these; mean_chosen, mean_rejected: tokens.
    """
    different = int(np.count_nonzero(chosen != rejected))
    longer = int(np.count_nonzero(chosen > rejected))
    return {
        "longer_chosen": longer / different if different else None,
        "pairs": different,
        "mean_chosen": float(chosen.mean()) if len(chosen) else None,
        "mean_rejected": float(rejected.mean()) if len(rejected) else None,
    }


def _count_flags(values: np.ndarray) -> dict[str, int]:
    """Return in how many pairs the template drops each kind of part, of those that it drops."""
    counts = {str(flag.name): int(np.count_nonzero(values & flag)) for flag in Dropped}
    return {name.lower(): count for name, count in counts.items() if count}


def _total(values: np.ndarray) -> int:
    # int32 columns of a large dataset would overflow, and JSON takes no numpy integers.
    return int(values.sum(dtype=np.int64))


def marked(sequence: TokenizedSequence, tokenizer: Any, style: str) -> Text:
    """Return a sequence as text that shows its scored tokens, with and without colour.

    Unscored tokens are dim. Scored ones are in ⟦ ⟧, in ``style``, every second one underlined, with
    a bar after each.
    """
    text = Text()
    text.append(show(tokenizer, sequence.tokens[: sequence.score_start].tolist()), style="dim")
    text.append("⟦", style="bold")
    pieces = Pieces(tokenizer).split(sequence.tokens[sequence.score_start :].tolist())
    for number, (piece, _) in enumerate(pieces):
        text.append(_breaks_shown(piece), style=f"{style} underline" if number % 2 else style)
        text.append("|", style="dim")
    text.append("⟧", style="bold")
    return text


class Pieces:
    """Divides tokens into pieces of text, one per token where a token is whole characters."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers omit the space before the first word: no token is decoded first.
        self._before = tokenizer.encode("a", add_special_tokens=False)[-1:]
        self._prefix = tokenizer.decode(self._before)
        self._texts: dict[int, str] = {}

    def split(self, tokens: list[int]) -> list[tuple[str, int]]:
        """Return (text, number of tokens) of each piece, with escapes for control characters.

        The bytes of one character may be several tokens: these are one piece.
        """
        pieces, first = [], 0
        while first < len(tokens):
            count, text = 1, self._text(tokens[first])
            # No character has more than 4 bytes; what is no text at all stays as it is.
            while _UNKNOWN in text and count < 4 and first + count < len(tokens):
                count += 1
                text = self._decode(tokens[first : first + count])
            if _UNKNOWN in text:
                count, text = 1, self._text(tokens[first])
            pieces.append((visible(text), count))
            first += count
        return pieces

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._decode([token])
        return self._texts[token]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(self._before + tokens).removeprefix(self._prefix)


def show(tokenizer: Any, tokens: list[int]) -> str:
    """Return tokens as text in which line breaks and control characters are visible."""
    return _breaks_shown(visible(tokenizer.decode(tokens)))


def _breaks_shown(text: str) -> str:
    return text.replace("\n", "↵\n")
