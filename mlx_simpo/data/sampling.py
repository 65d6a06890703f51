"""A random sample of a source's records, for a trial run."""

from collections.abc import Iterator
from dataclasses import replace

from .order import draw_sample
from .rows import Row, Source


def sample_records(source: Source, count: int, size: int, seed: int) -> Source:
    """Return a source with ``size`` of the ``count`` records that another one has.

    They are drawn at random, from the seed, and stay in their order and keep their numbers.
    """
    numbers = draw_sample(count, size, seed)

    def rows() -> Iterator[Row]:
        chosen = iter(numbers.tolist())
        expected = next(chosen)
        for row in source.rows():
            if row.number == expected:
                yield row
                if (expected := next(chosen, None)) is None:
                    return  # what comes after the last one is not even read

    # The label makes the cached tokens those of this sample.
    label = f"{size} of {count} records, drawn with seed {seed}"
    return replace(source, rows=rows, count=lambda: size, labels=(*source.labels, label))
