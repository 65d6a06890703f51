"""What stands out in data that are inspected: sentences for the terminal and for the page."""

from collections.abc import Iterator, Mapping
from typing import Any

from ..data.duplicates import leak_text
from .display import count_text

# Shares that chance alone rarely exceeds: two standard deviations of a fair coin; and with many
# pairs, what is far enough from 50 % to be learned.
_DEVIATIONS = 2.0
MIN_BIAS = 0.1


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """Return sentences on what stands out, the most serious first; [] if nothing does.

    Args:
        summary: of an inspection, as its JSON has it.
    """
    return [
        *_leaks(summary),
        *_contradictions(summary),
        *_repeats(summary),
        *filter(None, [length_bias(summary["length_bias"])]),
    ]


def template_text(part: str) -> str:
    """Return what the template does with a part of a pair that an inspection counts."""
    return {
        "system": "drops the system text",
        "tool_calls": "drops calls of tools",
        "null_content": "writes null content as a word",
        "prompt": "changes the prompt before the response",
    }.get(part, f"drops the {part}")


def _leaks(summary: Mapping[str, Any]) -> Iterator[str]:
    for leaks in summary["leaks"]:
        records = leaks["records"]
        if records:
            first = next((record for record in records if record["is_same"]), records[0])
            num_near = sum(not record["is_same"] for record in records)
            text = leak_text(
                f"pairs of {leaks['source']}",
                len(records),
                num_near,
                leaks["checked"],
                (first["pair"], first["like"]),
                " or ".join(leaks["in"]),
            )
            yield (
                f"{text}. If one is for training and the other for validation, the accuracy says "
                "how well these were memorized: remove them from one of the two."
            )


def _contradictions(summary: Mapping[str, Any]) -> Iterator[str]:
    pairs = summary["contradictory_pairs"]
    if pairs:
        number, verb = (
            count_text(len(pairs), "pair"),
            "contradicts" if len(pairs) == 1 else "contradict",
        )
        yield (
            f"{number} {verb} an earlier one{_as_truncated(summary)}: the same two responses to "
            f"the same prompt, but the other one is preferred, e.g. {pairs[0][0]} and "
            f"{pairs[0][1]}. Nothing can be learned from both: remove one, or both."
        )


def _repeats(summary: Mapping[str, Any]) -> Iterator[str]:
    pairs, near = summary["repeated_pairs"], summary["near_prompts"]
    if pairs:
        number, verb = count_text(len(pairs), "pair"), "repeats" if len(pairs) == 1 else "repeat"
        yield (
            f"{number} {verb} an earlier one{_as_truncated(summary)}, e.g. {pairs[0][0]} and "
            f"{pairs[0][1]}: such a pair counts twice in every epoch. Remove the copies, unless "
            "that is what you want."
        )
    if near:
        is_or_are = "prompt is" if len(near) == 1 else "prompts are"
        yield (
            f"{len(near):,} {is_or_are} nearly the same as an earlier one, e.g. {near[0]['pair']} "
            f"and {near[0]['like']}. If pairs are held out for validation, such prompts can be "
            "on both sides; a run warns of that."
        )


def _as_truncated(summary: Mapping[str, Any]) -> str:
    """Return the words for pairs that may be the same only because of what was cut off."""
    return " (both as truncated)" if summary["responses_cut"] else ""


def length_bias(bias: Mapping[str, Any]) -> str | None:
    """Say so if the longer (or the shorter) response is the preferred one too often.

    Args:
        bias: see `data.inspection.length_bias`.
    """
    share, pairs = bias["longer_chosen"], bias["pairs"]
    if share is None or abs(share - 0.5) < max(MIN_BIAS, _DEVIATIONS * 0.5 / pairs**0.5):
        return None
    longer, shorter = ("longer", "shorter")[:: 1 if share > 0.5 else -1]
    part = "all" if share in (0, 1) else f"{max(share, 1 - share):.0%} of the"
    return (
        f"In {part} pairs the {longer} response is preferred ({bias['mean_chosen']:.0f} "
        f"tokens on average, the rejected ones {bias['mean_rejected']:.0f}). A model may learn the "
        f"length instead of the quality: add pairs in which the better response is the {shorter} "
        "one, and compare the lengths of what it writes after the training."
    )
