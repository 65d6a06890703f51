"""Sampling settings: their ranges, and those that would have no effect."""

from typing import Any

import pytest

from mlx_simpo import SamplingSettings, SimPOError
from mlx_simpo.errors import InvalidSettingsError
from mlx_simpo.sampling.settings import Spelling

OPTIONS = Spelling(lambda name: f"--{name}", " ")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_tokens": 1},
        {"temperature": 0},
        {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0, "seed": 0},
        {"temperature": 0.01, "top_p": 0.01, "top_k": 1, "min_p": 1.0, "seed": 2**32 - 1},
        {"temperature": 100.0},
        {"top_p": 1.0, "top_k": 0, "min_p": 0.0},  # the defaults, written out
    ],
)
def test_valid_settings(settings: dict[str, Any]) -> None:
    SamplingSettings(**settings).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be 1 or greater"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; it must be a whole number"),
        ({"max_tokens": True}, "max_tokens is True; it must be a whole number"),
        ({"temperature": -0.5}, "temperature is -0.5; it must be 0 for greedy decoding, or from "),
        ({"temperature": 0.001}, "or from 0.01 to 100"),
        ({"temperature": 1e9}, "or from 0.01 to 100"),
        ({"temperature": float("nan")}, "temperature is nan; it must be a finite number"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a finite number"),
        ({"temperature": 1, "top_p": 0.0}, "top_p is 0.0; it must be greater than 0 and at most 1"),
        ({"temperature": 1, "top_p": 1.5}, "top_p is 1.5; it must be greater than 0"),
        ({"temperature": 1, "top_k": -1}, "top_k is -1; it must be 0 or greater (0: all tokens)"),
        ({"temperature": 1, "min_p": 2.0}, "min_p is 2.0; it must be between 0 and 1"),
        ({"temperature": 1, "seed": -1}, "seed is -1; it must be from 0 to 4294967295"),
        ({"temperature": 1, "seed": 2**32}, "seed is 4294967296; it must be from 0 to"),
    ],
)
def test_values_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SimPOError) as raised:
        SamplingSettings(**settings).check()
    assert message in str(raised.value)


def test_what_greedy_decoding_would_ignore_is_an_error_that_says_what_to_type() -> None:
    settings = SamplingSettings(top_p=0.9, top_k=5, min_p=0.1, seed=0)
    expected = [
        f"{name} is {value}, which has no effect at temperature 0, where the likeliest token is "
        f"always taken; add --temperature 0.7, or leave {name} out"
        for name, value in (("--top_p", 0.9), ("--top_k", 5), ("--min_p", 0.1), ("--seed", 0))
    ]
    assert list(settings.problems(OPTIONS)) == expected
    with pytest.raises(SimPOError, match=r"top_p is 0.9, .* add temperature=0.7, or leave top_p"):
        SamplingSettings(top_p=0.9).check()


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(InvalidSettingsError) as raised:
        SamplingSettings(0, -1.0, 0.5, -2).check()
    assert [message.split()[0] for message in raised.value.messages] == [
        "max_tokens",
        "temperature",
        "top_k",
    ]
