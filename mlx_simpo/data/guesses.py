"""Guess which columns of unknown data are prompt, chosen and rejected, for the user to confirm.

A guess is only ever shown, as a setting that can be pasted; nothing is trained on it.
"""

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

# Words in a column's name that suggest what it holds. In this order, because a name that says
# "non-preferred" says "preferred", too, and a system prompt is no prompt.
_WORDS = {
    "system": ("system",),
    "rejected": (
        *(
            "reject",
            "nonprefer",
            "non",
            "dispref",
            "disprefer",
            "unchosen",
            "bad",
            "worse",
            "worst",
        ),
        *("lose", "losing", "loss", "lost", "negative", "neg", "dislike", "l"),
    ),
    "chosen": (
        *("chosen", "prefer", "accept", "good", "better", "best", "win", "positive", "pos"),
        *("like", "w"),
    ),
    "prompt": (
        *("prompt", "query", "question", "instruct", "input", "request", "user", "message"),
        *("conversation", "context", "problem", "task"),
    ),
}
# A column about a response or prompt, which is not the text itself.
_ABOUT = (
    "score",
    "rating",
    "rank",
    "model",
    "id",
    "source",
    "reason",
    "rationale",
    "length",
    "len",
)
_PLAIN_NAME = re.compile(r"[A-Za-z][\w.-]*")
# What YAML reads as something else than text.
_YAML_WORDS = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")


def guess_columns(record: Mapping[str, Any]) -> dict[str, str]:
    """Return {our name: its column} for those names of ours that a column's name suggests.

    Only columns whose value is text, a list or an object are considered.
    """
    names = [name for name, value in record.items() if isinstance(value, str | list | dict)]
    guess: dict[str, str] = {}
    for ours, words in _WORDS.items():
        remaining = [name for name in names if name not in guess.values()]
        exact = [name for name in remaining if name == ours]
        similar = [name for word in words for name in remaining if _suggests(name, word)]
        # The one column that nothing else takes is the prompt, whatever its name.
        last = remaining if ours == "prompt" and len(remaining) == 1 else []
        if exact or similar or last:
            guess[ours] = (exact or similar or last)[0]
    return {
        ours: guess[ours] for ours in ("prompt", "chosen", "rejected", "system") if ours in guess
    }


def _suggests(name: str, word: str) -> bool:
    """Return whether a column's name has a word, or one that begins with a longer one."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    parts = re.split(r"[^a-z]+", spaced.lower())
    if not set(parts).isdisjoint(_ABOUT):
        return False
    return any(part == word or (len(word) > 3 and part.startswith(word)) for part in parts)


def mapping_line(record: Mapping[str, Any], only: str | None = None) -> tuple[str, str] | None:
    """Return (columns that are guessed, the setting that names them), ready to be pasted.

    What cannot be guessed is "…" in the setting.

    Args:
        only: a name of ours, if it is the only one that is missing.

    Returns:
        None if nothing can be guessed.
    """
    guess = guess_columns(record)
    if only is not None:
        guess = {only: guess[only]} if only in guess else {}
    if not guess:
        return None
    required = {} if only is not None else dict.fromkeys(("prompt", "chosen", "rejected"), "…")
    pairs = [f"{ours}: {_yaml(theirs)}" for ours, theirs in (required | guess).items()]
    return ", ".join(guess.values()), shlex.quote(f"data.columns={{{', '.join(pairs)}}}")


def _yaml(name: str) -> str:
    if name == "…" or (_PLAIN_NAME.fullmatch(name) and name.lower() not in _YAML_WORDS):
        return name
    return json.dumps(name, ensure_ascii=False)
