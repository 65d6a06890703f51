"""Comparing the logits of both sides of a conversion on the same text."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import get_total_parameters

from ...device import total_memory_bytes
from ...engine.vocabulary import check_prompt_ids
from ...errors import SimPOError, one_line
from ...model.loading import LoadedModel

# Ten times the difference between torch and MLX in float32 on SmolLM2 without any adapter. Setting
# a single B to zero changes the logits of every tiny model by more than twice the limit
# (tests/parity/test_convert_zoo.py).
TOLERANCE = 1e-3
# Rounding errors grow with the logits: the tolerance does, too, above the largest ones of SmolLM2.
TYPICAL_LOGIT = 32.0
MAX_TOKENS = 96  # of each text
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
    """How much the logits of two sides differ.

    what: the two sides, for people. largest, mean: of the absolute difference. agreement: share of
    positions with the same most likely token. limit: for ``largest``; None for a difference that is
    only shown.
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


def compare(
    what: str, actual: Logits, expected: Logits, baseline: float | None = 0.0
) -> Comparison:
    """Compare the logits of two sides.

    Args:
        what: the two sides, for people.
        baseline: the difference that has other reasons than the conversion; the limit is this plus
            the tolerance for rounding. None for a difference that is only shown.

    Raises:
        SimPOError: the logits have different shapes.
    """
    if actual.shape != expected.shape:
        raise SimPOError(f"{what}: logits have shapes {actual.shape} and {expected.shape}")
    finite = bool(np.isfinite(actual).all() and np.isfinite(expected).all())
    # Infinite logits on both sides are not equal: their difference would be NaN.
    difference = np.abs(actual - expected) if finite else np.array(np.inf)
    size = max(1.0, float(np.abs(expected).max()) / TYPICAL_LOGIT) if finite else 1.0
    return Comparison(
        what,
        float(difference.max()),
        float(difference.mean()),
        float((actual.argmax(-1) == expected.argmax(-1)).mean()),
        # Beyond the baseline, since differences of the two kinds may add up.
        None if baseline is None else baseline + TOLERANCE * size,
    )


def check(comparisons: list[Comparison]) -> None:
    """Check that all comparisons passed.

    Raises:
        SimPOError: one failed.
    """
    for comparison in comparisons:
        if not comparison.passed:
            raise verification_error(str(comparison))


def verification_error(reason: str) -> SimPOError:
    """Return the error for a conversion whose result differs from its source."""
    return SimPOError(
        f"verification failed, so nothing was written: {reason}; please report this with the "
        "model's name (--no-verify writes the result unchecked)"
    )


def sample_tokens(loaded: LoadedModel) -> list[list[int]]:
    """Return TEXTS as token ids, all of the same length.

    Raises:
        SimPOError: the tokenizer fails, makes no tokens of them, or makes tokens that are not in
            the model's vocabulary.
    """
    with errors_of_running():
        rows = [list(map(int, loaded.tokenizer.encode(text)))[:MAX_TOKENS] for text in TEXTS]
    length = min(map(len, rows))
    if length < 2:
        raise SimPOError(
            "the tokenizer makes no tokens of ordinary text, which verification needs; use "
            "--no-verify"
        )
    with errors_of_running():
        check_prompt_ids([token for row in rows for token in row], loaded.model, loaded.name)
    return [row[:length] for row in rows]


@contextmanager
def errors_of_running() -> Iterator[None]:
    """Convert errors that a model or tokenizer raises when it runs into readable ones.

    Some invalid settings are noticed only then.

    Raises:
        SimPOError: in place of these errors.
    """
    try:
        yield
    except (ValueError, TypeError, RuntimeError, OverflowError, AttributeError) as error:
        reason = f"{type(error).__name__}: {one_line(error, 300)}"
        raise SimPOError(f"the model cannot be run: {reason}") from None


def mlx_logits(model: nn.Module, tokens: list[list[int]]) -> Logits:
    """Run an MLX model in float32 on the CPU, and leave it in float32.

    Args:
        tokens: (texts, tokens).

    Returns:
        (texts, tokens, vocabulary), float32.

    Raises:
        SimPOError: the model cannot be run.
    """
    # Not on a GPU, which may round the factors of float32 products (MLX_ENABLE_TF32).
    with mx.stream(mx.cpu), errors_of_running():
        model.set_dtype(mx.float32)
        model.eval()
        return np.array(model(mx.array(tokens)).astype(mx.float32))


def should_verify(verify: bool | None, model: nn.Module, note: Callable[[str], None]) -> bool:
    """Whether to verify a conversion: as the user wishes, or if the model fits into memory.

    Args:
        verify: the user's wish; None if there is none.
        note: called with the reason if the model does not fit.
    """
    if verify is not None:
        return verify
    needed = 4 * get_total_parameters(model)
    # Twice: in float32, beside the weights as they are in the file.
    memory = total_memory_bytes()
    if 2 * needed <= memory:
        return True
    note(
        f"not verified: the model takes {needed / 1e9:.0f} GB in float32, and twice that does not "
        f"fit into {memory / 1e9:.0f} GB of memory; --verify verifies it anyway"
    )
    return False
