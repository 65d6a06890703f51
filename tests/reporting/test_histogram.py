"""Histograms: every value is in one bar, and the bars are where the axis says."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo.reporting.histogram import BINS, HEIGHT, WIDTH, histogram

VALUES = st.lists(st.integers(1, 3000), min_size=1, max_size=60)


def count_of(title: str) -> int:
    """The number in "chosen: 1,200 with 5 to 9 tokens"."""
    return int(title.split(": ")[1].split(" with ")[0].replace(",", ""))


@given(VALUES, VALUES)
@settings(deadline=None, max_examples=100)
def test_all_values_are_in_the_drawing(chosen: list[int], rejected: list[int]) -> None:
    result = histogram({"chosen": np.array(chosen), "rejected": np.array(rejected)})
    for name, values in (("chosen", chosen), ("rejected", rejected)):
        bars = [bar for bar in result.bars if bar.series == name]
        assert sum(count_of(bar.title) for bar in bars) == len(values)
        assert len(bars) <= BINS
    for bar in result.bars:
        assert 0 <= bar.x <= bar.x + bar.width <= WIDTH + 0.1
        assert 0 <= bar.y < bar.y + bar.height <= HEIGHT + 0.01
    assert result.ticks[0] == (0.0, f"{min(chosen + rejected):,}")
    assert result.ticks[-1][0] == WIDTH


def test_heights_are_proportional() -> None:
    values = np.repeat([10, 20, 30], [40, 20, 10])
    bars = histogram({"prompt": values}).bars
    assert [round(bar.height / (HEIGHT - 4), 2) for bar in bars] == [1, 0.5, 0.25]
    assert [bar.title for bar in bars] == [
        "prompt: 40 with 10 tokens",
        "prompt: 20 with 20 tokens",
        "prompt: 10 with 30 tokens",
    ]


def test_few_very_long_ones_are_in_the_last_bar() -> None:
    """Not at the end of an axis on which all others would be one bar."""
    result = histogram({"prompt": np.array([*range(1, 240), 100_000])})
    assert len(result.bars) == BINS
    assert result.bars[-1].title.endswith(" or more tokens")
    assert result.ticks[-1][1].endswith(" +")


def test_one_length() -> None:
    result = histogram({"prompt": np.array([7, 7])})
    assert [bar.title for bar in result.bars] == ["prompt: 2 with 7 tokens"]
    assert result.ticks == [(0.0, "7"), (WIDTH, "7")]
