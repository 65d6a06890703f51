"""What counts as the same, what does not, and what is said."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import captured_display
from helpers.tiny import tiny_model, tiny_tokenizer

from mlx_simpo.convert.verify import compare as verify
from mlx_simpo.errors import SimPOError
from mlx_simpo.model.loading import LoadedModel


def logits(*changes: tuple[int, float], size: float = 1.0) -> np.ndarray:
    """(1, 4, 5) logits of this size, with single entries of the last token changed."""
    values = np.linspace(-size, size, 20, dtype=np.float32).reshape(1, 4, 5)
    for place, by in changes:
        values[0, -1, place] += by
    return values


def test_the_same_is_the_same() -> None:
    found = verify.compare("a and b", logits(), logits())
    assert (found.largest, found.mean, found.agreement, found.passed) == (0, 0, 1, True)
    assert "a and b: logits differ by 0.0e+00" in str(found)


@pytest.mark.parametrize(
    ("by", "size", "floor", "passed"),
    [
        (9e-4, 1.0, 0.0, True),
        (1.2e-3, 1.0, 0.0, False),
        (1.2e-3, 1.0, 3e-4, True),  # the base differs by as much
        (1.2e-3, 64.0, 0.0, True),  # rounding grows with the numbers
        (3e-3, 64.0, 0.0, False),
        (float("nan"), 1.0, 0.0, False),
        (float("inf"), 1.0, 0.0, False),
        (50.0, 1.0, None, True),  # shown and not judged
    ],
)
def test_the_limit(by: float, size: float, floor: float | None, passed: bool) -> None:
    found = verify.compare("", logits((2, by), size=size), logits(size=size), floor)
    assert found.passed == passed


@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_on_either_side_is_no_proof(sign: int) -> None:
    broken = logits((1, sign * float("inf")))
    assert not verify.compare("", broken, logits()).passed
    assert not verify.compare("", logits(), broken).passed
    assert not verify.compare("", broken, broken).passed


def test_nan_on_both_sides_is_no_proof() -> None:
    broken = logits((1, float("nan")))
    assert not verify.compare("", broken, broken).passed


def test_agreement_counts_positions() -> None:
    found = verify.compare("", logits((0, 5.0)), logits(), None)
    assert found.agreement == 0.75
    assert "75.0%" in str(found)


def test_a_failure_names_the_sides_and_the_way_out() -> None:
    bad = verify.compare("here and there", logits((1, 1.0)), logits())
    with pytest.raises(SimPOError, match=r"here and there: .*allowed: 1\.0e-03.*--no-verify"):
        verify.check([verify.compare("", logits(), logits()), bad])


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(SimPOError, match="shapes"):
        verify.compare("", logits(), logits()[:, 1:])


def tiny_loaded(**changes: int) -> LoadedModel:
    """A model and its tokenizer, as far as they are looked at here."""
    model = tiny_model(**changes)
    return LoadedModel(model, tiny_tokenizer(), {}, "float32", Path(), "tiny", None)


def test_tokens_beyond_the_vocabulary_are_refused() -> None:
    """MLX would read whatever lies behind the table."""
    with pytest.raises(SimPOError, match=r"has token \d+, its model a vocabulary of 100"):
        verify.sample_tokens(tiny_loaded(vocab_size=100))


def test_a_model_that_cannot_be_run() -> None:
    model = tiny_model()
    model.model.norm.weight = mx.ones(7)
    with pytest.raises(SimPOError, match="cannot be run: ValueError"):
        verify.mlx_logits(model, [[1, 2, 3]])


def test_the_text_is_long_enough_to_be_one() -> None:
    rows = verify.sample_tokens(tiny_loaded())
    assert len({len(row) for row in rows}) == 1
    assert len(rows[0]) == verify.TOKENS
    assert len(set(rows[0])) > 30


@pytest.mark.parametrize(
    ("asked", "memory", "expected"),
    [
        (None, 10**12, True),
        (None, 1000, False),
        (True, 1000, True),
        (False, 10**12, False),
    ],
)
def test_whether_to_verify(
    asked: bool | None, memory: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "total_memory_bytes", lambda: memory)
    display, text = captured_display()
    assert verify.wanted(asked, tiny_model(), display.note) == expected
    assert ("not verified" in text.getvalue()) == (asked is None and not expected)
