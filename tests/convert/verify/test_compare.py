"""Which differences between logits pass, which do not, and how they are shown."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import captured_display
from helpers.tiny import tiny_model, tiny_tokenizer

from mlx_simpo.convert.verify import compare as verify
from mlx_simpo.errors import SimPOError
from mlx_simpo.model.loading import LoadedModel


def logits(*changes: tuple[int, float], size: float = 1.0) -> np.ndarray:
    """(1, 4, 5) logits of this size, with changes added to single entries of the last token."""
    values = np.linspace(-size, size, 20, dtype=np.float32).reshape(1, 4, 5)
    for index, change in changes:
        values[0, -1, index] += change
    return values


def test_equal_logits_pass() -> None:
    result = verify.compare("a and b", logits(), logits())
    assert (result.largest, result.mean, result.agreement, result.passed) == (0, 0, 1, True)
    assert "a and b: logits differ by 0.0e+00" in str(result)


@pytest.mark.parametrize(
    ("change", "size", "baseline", "passed"),
    [
        (9e-4, 1.0, 0.0, True),
        (1.2e-3, 1.0, 0.0, False),
        (1.2e-3, 1.0, 3e-4, True),  # the base model differs by as much
        (1.2e-3, 64.0, 0.0, True),  # rounding grows with the numbers
        (3e-3, 64.0, 0.0, False),
        (float("nan"), 1.0, 0.0, False),
        (float("inf"), 1.0, 0.0, False),
        (50.0, 1.0, None, True),  # only shown
    ],
)
def test_the_limit(change: float, size: float, baseline: float | None, passed: bool) -> None:
    actual = logits((2, change), size=size)
    assert verify.compare("", actual, logits(size=size), baseline).passed == passed


@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_on_either_side_fails(sign: int) -> None:
    broken = logits((1, sign * float("inf")))
    assert not verify.compare("", broken, logits()).passed
    assert not verify.compare("", logits(), broken).passed
    assert not verify.compare("", broken, broken).passed


def test_nan_on_both_sides_fails() -> None:
    broken = logits((1, float("nan")))
    assert not verify.compare("", broken, broken).passed


def test_agreement_counts_positions() -> None:
    result = verify.compare("", logits((0, 5.0)), logits(), None)
    assert result.agreement == 0.75
    assert "75.0%" in str(result)


def test_a_failure_names_the_sides_and_the_remedy() -> None:
    failed = verify.compare("here and there", logits((1, 1.0)), logits())
    with pytest.raises(
        SimPOError,
        match=r"verification failed, so .*: here and there: .*allowed: 1\.0e-03.*--no-verify",
    ):
        verify.check([verify.compare("", logits(), logits()), failed])


def test_other_shapes_are_an_error() -> None:
    with pytest.raises(SimPOError, match=r"sides: logits have shapes \(1, 4, 5\) and \(1, 3, 5\)"):
        verify.compare("sides", logits(), logits()[:, 1:])


def tiny_loaded(**changes: Any) -> LoadedModel:
    """A model and its tokenizer."""
    model = tiny_model(**changes)
    return LoadedModel(model, tiny_tokenizer(), {}, "float32", Path(), "tiny", None)


def test_tokens_beyond_the_vocabulary_are_rejected() -> None:
    """MLX would read whatever is behind the embedding in memory."""
    with pytest.raises(SimPOError, match=r"has token \d+, but tiny has a vocabulary of 100"):
        verify.sample_tokens(tiny_loaded(vocab_size=100))


def test_a_model_that_cannot_be_run_is_an_error() -> None:
    model = tiny_model()
    model.model.norm.weight = mx.ones(7)
    with pytest.raises(SimPOError, match="cannot be run: ValueError"):
        verify.mlx_logits(model, [[1, 2, 3]])


def test_the_texts_have_many_different_tokens() -> None:
    tokens = verify.sample_tokens(tiny_loaded())
    assert {len(text) for text in tokens} == {verify.MAX_TOKENS}
    assert len(set(tokens[0])) > 30


@pytest.mark.parametrize(
    ("option", "memory", "expected"),
    [
        (None, 10**12, True),
        (None, 1000, False),
        (True, 1000, True),
        (False, 10**12, False),
    ],
)
def test_whether_to_verify(
    option: bool | None, memory: int, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "total_memory_bytes", lambda: memory)
    display, text = captured_display()
    assert verify.should_verify(option, tiny_model(), display.note) == expected
    assert ("not verified" in text.getvalue()) == (option is None and not expected)
