"""Histograms as SVG shapes: what the page's template draws, in numbers."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

BINS = 24
WIDTH, HEIGHT = 480, 120
# The longest of many pairs would press all others into the first bin: the last bin has them all.
_LAST_BIN_FROM = 0.99


class Bar(NamedTuple):
    """A rectangle with what it says when pointed at."""

    x: float
    y: float
    width: float
    height: float
    title: str
    series: str


class Histogram(NamedTuple):
    """Bars in a drawing of WIDTH × HEIGHT, and (x, label) along its axis."""

    bars: list[Bar]
    ticks: list[tuple[float, str]]


def histogram(series: Mapping[str, np.ndarray]) -> Histogram:
    """Return the histogram of one or two series of whole numbers, side by side in the same bins.

    Args:
        series: int [N] by name, N ≥ 1.
    """
    everything = np.concatenate(list(series.values()))
    low, high = int(everything.min()), int(np.quantile(everything, _LAST_BIN_FROM, method="higher"))
    step = max(1, -(-(high - low + 1) // BINS))
    edges = low + step * np.arange(-(-(high - low + 1) // step) + 1)
    is_open = int(everything.max()) >= edges[-1]
    counts = {
        name: np.histogram(np.minimum(values, edges[-1] - 1), edges)[0]
        for name, values in series.items()
    }
    highest = max(1, *(int(count.max()) for count in counts.values()))
    slot = WIDTH / (len(edges) - 1)
    width = max(1.0, (slot - 2) / len(series))
    bars = []
    for position, (name, values) in enumerate(counts.items()):
        for index, count in enumerate(values.tolist()):
            if not count:
                continue
            first, last = int(edges[index]), int(edges[index + 1]) - 1
            is_last = is_open and index == len(values) - 1
            size = (
                f"{first:,} or more"
                if is_last
                else f"{first:,}"
                if first == last
                else f"{first:,} to {last:,}"
            )
            height = max(1.0, (HEIGHT - 4) * count / highest)
            bars.append(
                Bar(
                    round(index * slot + 1 + position * width, 2),
                    round(HEIGHT - height, 2),
                    round(width, 2),
                    round(height, 2),
                    f"{name}: {count:,} with {size} tokens",
                    name,
                )
            )
    middle = len(edges) // 2
    ticks = [(0.0, f"{low:,}")]
    if 0 < middle < len(edges) - 1:
        ticks.append((round(middle * slot, 2), f"{int(edges[middle]):,}"))
    ticks.append((float(WIDTH), f"{int(edges[-1]) - 1:,}{' +' if is_open else ''}"))
    return Histogram(bars, ticks)
