"""Markdown in which text of other people's making stays text."""

import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_simpo.hub.markdown import code, format_value, is_number, printable, table


@given(st.text(max_size=30))
def test_code_stays_within_its_line_and_fence(text: str) -> None:
    result = code(text)
    assert result.isprintable()
    fence = re.match("`+", result)
    assert fence or not text
    if text and fence and not set(text) <= {"`"}:
        assert result.endswith(fence[0])
        runs = re.findall("`+", result[len(fence[0]) : -len(fence[0])])
        assert all(len(run) < len(fence[0]) for run in runs)


def test_a_bar_does_not_end_a_cell() -> None:
    assert table(("a",), [("x|y",)]).splitlines()[-1] == r"| x\|y |"


def test_a_table() -> None:
    assert table(("a", "b"), [("1", "2")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"


def test_what_is_not_printable_is_escaped() -> None:
    assert printable("ü\n\u202e\ud83d") == r"ü\n\u202e\ud83d"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (True, "yes"),
        (False, "no"),
        (5e-05, "5e-05"),
        (["q_proj", 3], "`q_proj`, 3"),
        ("a`b", "`` a`b ``"),
        (math.inf, "`inf`"),
        (None, "`None`"),
    ],
)
def test_values_of_settings(value: Any, text: str) -> None:
    assert format_value(value) == text


@pytest.mark.parametrize("value", [True, None, "1", math.nan, math.inf, [1]])
def test_not_a_number(value: Any) -> None:
    assert not is_number(value)
