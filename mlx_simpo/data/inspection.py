"""What is in a data set and what will be trained: counts, lengths, losses, one pair in tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.text import Text

from .encode import EncodedPair, Encoder, Scored
from .pairs import Quarantined, count_reasons

QUANTILES = {"min": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "max": 1.0}


def summarize(
    pairs: Sequence[EncodedPair], left_out: Sequence[Quarantined], encoder: Encoder
) -> dict[str, Any]:
    """Counts and length quantiles of an encoded data set, ready for JSON."""
    lengths = {
        "prompt": [p.chosen.start for p in pairs],
        "chosen": [p.chosen.scored for p in pairs],
        "rejected": [p.rejected.scored for p in pairs],
        "longer sequence": [p.length for p in pairs],
    }
    return {
        "records": len(pairs) + len(left_out),
        "pairs": len(pairs),
        "chat_template": encoder.renderer.origin,
        "left_out": count_reasons(left_out),
        "left_out_records": [q._asdict() for q in left_out],
        "prompts_cut": sum(p.cut_prompt > 0 for p in pairs),
        "answers_cut": sum(p.cut_answers > 0 for p in pairs),
        "tokens_cut": sum(p.cut_prompt + p.cut_answers for p in pairs),
        "boundary_moved": sum(p.moved > 0 for p in pairs),
        "tokens": sum(len(p.chosen.tokens) + len(p.rejected.tokens) for p in pairs),
        "scored_tokens": sum(p.chosen.scored + p.rejected.scored for p in pairs),
        "lengths": {
            name: {label: int(np.quantile(values, q)) for label, q in QUANTILES.items()}
            for name, values in lengths.items()
        },
    }


def marked(sequence: Scored, tokenizer: Any, style: str) -> Text:
    """A sequence with its scored tokens told apart, with and without colour.

    What is only read is dim; each scored token is underlined in turns and ends in a bar.
    """
    text = Text()
    text.append(show(tokenizer, sequence.tokens[: sequence.start].tolist()), style="dim")
    text.append("⟦", style="bold")
    for number, token in enumerate(sequence.tokens[sequence.start :].tolist()):
        text.append(show(tokenizer, [token]), style=f"{style} underline" if number % 2 else style)
        text.append("|", style="dim")
    text.append("⟧", style="bold")
    return text


def show(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(tokens).replace("\n", "↵\n")
