"""Both sides of a conversion on the same text: their logits, compared."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import get_total_parameters

from ...errors import SimPOError, one_line
from ...model.loading import LoadedModel
from ..names import EMBEDDING

# 1e-3 is ten times what torch and MLX differ by in float32 on SmolLM2 without any adapter; a single
# B set to zero moves the logits of every tiny model by more than twice what passes
# (tests/parity/test_convert_zoo.py).
TOLERANCE = 1e-3
# Logits of models differ in size; those of SmolLM2 reach 32, and rounding grows with them.
USUAL_LOGIT = 32.0
TOKENS = 96
TEXTS = (
    "The tide goes out twice a day on this coast, and when it does, the children walk to the old "
    "wreck with buckets and a dog. Their grandmother counts them from the kitchen window: four, "
    "then three, then four again. What she cannot see is the sandbank behind the hull, where the "
    "water comes back first, and quietly.",
    "def median(values):\n    ordered = sorted(values)\n    middle = len(ordered) // 2\n    if "
    "len(ordered) % 2:\n        return ordered[middle]\n    return (ordered[middle - 1] + "
    "ordered[middle]) / 2\n\nprint(median([3, 1, 4, 1, 5, 9, 2, 6]))  # 3.5\n\n"
    "Q: A train leaves at 9:40 and needs 2 h 35 min. When does it arrive? A: At 12:15.",
)
Logits = np.ndarray  # (texts, tokens, vocabulary), float32


class Comparison(NamedTuple):
    """Logits of one side against the other's.

    what: the two sides, for people. largest, mean: of the absolute difference. agreement: share of
    positions with the same most likely token. limit: what ``largest`` may be; None: not a check.
    """

    what: str
    largest: float
    mean: float
    agreement: float
    limit: float | None

    @property
    def passed(self) -> bool:
        """Whether the difference is within the limit (NaN is not)."""
        return self.limit is None or self.largest <= self.limit

    def __str__(self) -> str:
        text = (
            f"{self.what}: logits differ by {self.largest:.1e} at most, {self.mean:.1e} on "
            f"average; most likely token the same at {self.agreement:.1%} of positions"
        )
        return text if self.limit is None else f"{text} (allowed: {self.limit:.1e})"


def compare(what: str, found: Logits, expected: Logits, floor: float | None = 0.0) -> Comparison:
    """Compare two sides.

    Args:
        floor: what the two differ by for reasons that are not the conversion's, beside rounding;
            None if the difference is to be known and not judged.
    """
    if found.shape != expected.shape:
        raise SimPOError(f"{what}: logits have shapes {found.shape} and {expected.shape}")
    finite = bool(np.isfinite(found).all() and np.isfinite(expected).all())
    difference = np.abs(found - expected) if finite else np.array(np.inf)
    size = max(1.0, float(np.abs(expected).max()) / USUAL_LOGIT) if finite else 1.0
    return Comparison(
        what,
        float(difference.max()),
        float(difference.mean()),
        float((found.argmax(-1) == expected.argmax(-1)).mean()),
        None if floor is None else floor + TOLERANCE * size,
    )


def check(comparisons: list[Comparison]) -> None:
    """SimPOError if one of the comparisons failed."""
    for comparison in comparisons:
        if not comparison.passed:
            raise wrong(str(comparison))


def wrong(found: str) -> SimPOError:
    """The error for a conversion that does not hold what it should."""
    return SimPOError(
        f"the conversion is not right and nothing was written: {found}; please report it with the "
        "model's name (--no-verify writes the result unchecked)"
    )


def sample_tokens(loaded: LoadedModel) -> list[list[int]]:
    """The texts as token ids, all of the same length.

    Raises:
        SimPOError: the tokenizer makes none, or ids that the model has no row for (MLX would read
            beyond its memory).
    """
    with runnable():
        rows = [list(map(int, loaded.tokenizer.encode(text)))[:TOKENS] for text in TEXTS]
    length = min(map(len, rows))
    if length < 2:
        raise SimPOError("the tokenizer makes no tokens of ordinary text; use --no-verify")
    tables = (m for m in loaded.model.modules() if isinstance(m, EMBEDDING))
    vocabulary = max((len(table["weight"]) for table in tables), default=0)
    highest = max(map(max, rows))
    if highest >= vocabulary:
        raise SimPOError(
            f"the tokenizer of {loaded.name} has token {highest}, its model a vocabulary of "
            f"{vocabulary}; they do not belong together"
        )
    return [row[:length] for row in rows]


@contextmanager
def runnable() -> Iterator[None]:
    """SimPOError for settings of a model or tokenizer that only show when it is run."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OverflowError, AttributeError) as error:
        said = one_line(error, 300)
        raise SimPOError(f"the model cannot be run: {type(error).__name__}: {said}") from None


def mlx_logits(model: nn.Module, tokens: list[list[int]]) -> Logits:
    """An MLX model's logits, in float32.

    On the CPU, whatever device there is: GPUs may round the factors of float32 products
    (MLX_ENABLE_TF32). The model is left in float32.

    Raises:
        SimPOError: it cannot be run.
    """
    with mx.stream(mx.cpu), runnable():
        model.set_dtype(mx.float32)
        model.eval()
        return np.array(model(mx.array(tokens)).astype(mx.float32))


def wanted(verify: bool | None, model: nn.Module, note: Callable[[str], None]) -> bool:
    """Whether to verify: as asked for, or where the model fits into memory in float32."""
    if verify is not None:
        return verify
    needed = 4 * get_total_parameters(model)
    # Twice: the products of a layer and its weights in float32 beside those of the file.
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 2 * needed <= memory:
        return True
    note(
        f"not verified: in float32 the model takes {needed / 1e9:.0f} GB of {memory / 1e9:.0f} GB; "
        "--verify does it all the same"
    )
    return False
