"""What a dataset holds and what will be trained on: counts, lengths, cuts, one pair as tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.text import Text

from ..errors import visible
from .encode import EncodedPair, Encoder, TokenizedSequence
from .pairs import Quarantined, count_reasons
from .tokens import column, lengths

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
        "tokens": _total(chosen) + _total(rejected),
        "scored_tokens": _total(responses["chosen"]) + _total(responses["rejected"]),
        "lengths": {
            name: {label: int(np.quantile(values, q)) for label, q in QUANTILES.items()}
            for name, values in token_counts.items()
        },
    }


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
    for number, token in enumerate(sequence.tokens[sequence.score_start :].tolist()):
        text.append(show(tokenizer, [token]), style=f"{style} underline" if number % 2 else style)
        text.append("|", style="dim")
    text.append("⟧", style="bold")
    return text


def show(tokenizer: Any, tokens: list[int]) -> str:
    """Return tokens as text in which line breaks and control characters are visible."""
    return visible(tokenizer.decode(tokens)).replace("\n", "↵\n")
