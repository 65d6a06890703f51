"""What is in a data set and what will be trained: counts, lengths, losses, one pair in tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.text import Text

from .encode import EncodedPair, Encoder, TokenizedSequence
from .pairs import Quarantined, count_reasons
from .tokens import column, lengths

QUANTILES = {"min": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}


def summarize(
    pairs: Sequence[EncodedPair], quarantined: Sequence[Quarantined], encoder: Encoder
) -> dict[str, Any]:
    """Counts and length quantiles of an encoded data set, ready for JSON."""
    chosen, rejected = column(pairs, "chosen"), column(pairs, "rejected")
    prompts = column(pairs, "chosen_score_start")
    scored = {
        "chosen": chosen - prompts,
        "rejected": rejected - column(pairs, "rejected_score_start"),
    }
    sizes = {"prompt": prompts, **scored, "longer sequence": lengths(pairs)}
    of_prompts, of_answers = column(pairs, "cut_prompt"), column(pairs, "cut_response")
    return {
        "records": len(pairs) + len(quarantined),
        "pairs": len(pairs),
        "chat_template": encoder.renderer.origin,
        "left_out": count_reasons(quarantined),
        "left_out_records": [q._asdict() for q in quarantined],
        "prompts_cut": int(np.count_nonzero(of_prompts)),
        "answers_cut": int(np.count_nonzero(of_answers)),
        "tokens_cut": total(of_prompts) + total(of_answers),
        "boundary_moved": int(np.count_nonzero(column(pairs, "boundary_tokens"))),
        "tokens": total(chosen) + total(rejected),
        "scored_tokens": total(scored["chosen"]) + total(scored["rejected"]),
        "lengths": {
            name: {label: int(np.quantile(values, q)) for label, q in QUANTILES.items()}
            for name, values in sizes.items()
        },
    }


def total(values: np.ndarray) -> int:
    """The sum, as a number that JSON can hold."""
    return int(values.sum(dtype=np.int64))


def marked(sequence: TokenizedSequence, tokenizer: Any, style: str) -> Text:
    """A sequence with its scored tokens told apart, with and without colour.

    What is only read is dim; each scored token is underlined in turns and ends in a bar.
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
    """Tokens as text, with line breaks made visible."""
    return tokenizer.decode(tokens).replace("\n", "↵\n")
