"""Guesses of columns: what is suggested, and that what is shown can be pasted."""

import shlex
from typing import Any

import pytest

from mlx_simpo import load_config
from mlx_simpo.data.guesses import guess_columns, mapping_line


def record(*names: str) -> dict[str, Any]:
    return dict.fromkeys(names, "text")


@pytest.mark.parametrize(
    ("names", "guess"),
    [
        (("query", "good", "bad"), ("query", "good", "bad")),
        (("user_input", "win", "lose"), ("user_input", "win", "lose")),
        (("x", "y_w", "y_l"), ("x", "y_w", "y_l")),
        (
            ("question", "best_response", "worst_response"),
            ("question", "best_response", "worst_re"),
        ),
        (("in", "preferred", "dispreferred"), ("in", "preferred", "dispreferred")),
        (("id", "q", "preferred_output", "non_preferred_output"), (None, "preferred", "non_pref")),
        (("problem", "answerPositive", "answerNegative"), ("problem", "answerPos", "answerNeg")),
        (
            ("chosen_model", "chosen_text", "rejected_text", "task"),
            ("task", "chosen_t", "rejected_t"),
        ),
        (("instruction", "chosen_score", "a", "b"), ("instruction", None, None)),
        (("prompt_id", "prompt", "chosen", "rejected"), ("prompt", "chosen", "rejected")),
    ],
)
def test_guesses(names: tuple[str, ...], guess: tuple[str | None, ...]) -> None:
    actual = guess_columns(record(*names))
    for ours, start in zip(("prompt", "chosen", "rejected"), guess, strict=True):
        assert (start is None) == (ours not in actual), actual
        assert start is None or actual[ours].startswith(start), actual


def test_a_system_prompt_is_no_prompt() -> None:
    assert guess_columns(record("system_prompt", "query", "good", "bad")) == {
        "prompt": "query",
        "chosen": "good",
        "rejected": "bad",
        "system": "system_prompt",
    }


def test_numbers_are_no_text() -> None:
    values = {"prompt_len": 5, "chosen": 0.5, "good": "a", "bad": "b", "question": "q"}
    assert guess_columns(values) == {"prompt": "question", "chosen": "good", "rejected": "bad"}


@pytest.mark.parametrize(
    "names",
    [
        ("query", "good", "bad"),
        ("the question", "good: response", "bad, response"),
        ("user's query", 'good "x"', "bad {y}"),
        ("question #1", "yes good", "no-bad"),
        ("問い prompt", "good", "bad"),
        ("prompt", "y", "bad"),
    ],
)
def test_the_suggestion_can_be_pasted(names: tuple[str, ...]) -> None:
    """Through a shell, and through the parser of settings."""
    guess = mapping_line(record(*names))
    assert guess is not None
    (setting,) = shlex.split(guess[1])
    columns = load_config(None, ["model=m", setting.replace("…", "x")]).data.columns
    expected = dict(zip(("prompt", "chosen", "rejected"), names, strict=True))
    assert columns == {o: n if f" {n}" in f" {guess[0]}" else "x" for o, n in expected.items()}
    assert columns is not None
    assert columns["prompt"] == names[0]


def test_nothing_to_guess() -> None:
    assert mapping_line(record("a", "b")) is None
    assert mapping_line(record("a", "chosen"), only="prompt") == (
        "a",
        "'data.columns={prompt: a}'",
    )
    assert mapping_line({"chosen": "a"}, only="prompt") is None
