"""The timed steps: all variants, in turns, and one that fails is a row."""

from typing import Any

import mlx.core as mx
import pytest
from helpers.doctor import tiny_example

from mlx_simpo.doctor import steps as module
from mlx_simpo.doctor.steps import Measurement, Step, timed_steps, variants
from mlx_simpo.engine.choice import REFERENCE, Engine
from mlx_simpo.engine.figures import default_figures
from mlx_simpo.kernels.choice import BUILT_IN

NAMES = [
    "ours, attention blocks, checkpointing",
    "ours, attention mlx, checkpointing",
    "ours, attention blocks",
    "ours, attention mlx",
    "reference",
    "reference, compiled",
]


@pytest.fixture
def notes() -> list[str]:
    return []


def measured(notes: list[str], **changes: Any) -> list[dict[str, Any]]:
    example = tiny_example(**changes)
    ways = variants(example, BUILT_IN, default_figures(), shares=True)
    return [*timed_steps(example, ways, notes.append)]


def test_every_variant_is_a_row(notes: list[str]) -> None:
    rows = measured(notes)
    assert [row["variant"] for row in rows] == NAMES
    for row in rows:
        assert row["seconds"] > 0
        assert row["peak_gb"] > 0
        # 14 + 12 tokens of the first pair, 7 + 12 of the second.
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(45)
    assert rows[4]["positions"] > rows[2]["positions"]  # each prompt runs once


def test_variants_take_turns_there_and_back(notes: list[str]) -> None:
    measured(notes)
    told = [note.partition(": ")[0] for note in notes]
    assert told == NAMES + NAMES[::-1]
    assert notes[0].endswith("GB (turn 1 of 2)")


# With those that are not counted, in two turns.
@pytest.mark.parametrize(("limit", "steps"), [(None, 6), ("LONG", 4), ("VERY_LONG", 2)])
def test_long_steps_are_fewer(
    limit: str | None, steps: int, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONG", 0.0 if limit else 1e6)
    monkeypatch.setattr(module, "VERY_LONG", 0.0 if limit == "VERY_LONG" else 1e6)
    ran: list[int] = []

    def run_step(example: Any, measurement: Measurement, state: Any) -> Step:
        ran.append(1)
        return Step(0.5, 10**6 * len(ran))

    monkeypatch.setattr(module, "run_step", run_step)
    example = tiny_example()
    way = variants(example, BUILT_IN, default_figures(), shares=False)[:1]
    (row,) = timed_steps(example, way, notes.append)
    assert len(ran) == steps
    assert row["peak_gb"] == pytest.approx(steps / 1000)
    assert row["seconds"] == 0.5


def test_a_variant_that_fails_is_a_row_and_the_others_go_on(
    notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def logps(model: Any, arrays: tuple, training: bool) -> mx.array:
        raise RuntimeError("[metal::malloc] Attempting to allocate 9 bytes")

    broken: Engine = REFERENCE._replace(logps=logps)
    monkeypatch.setattr(module, "REFERENCE", broken)
    rows = measured(notes)
    assert [row["variant"] for row in rows] == NAMES
    assert rows[5] == {
        "variant": "reference, compiled",
        "problem": "RuntimeError: [metal::malloc] Attempting to allocate 9 bytes",
    }
    assert all("problem" not in row for row in rows[:4])
    assert sum("metal::malloc" in note for note in notes) == 2  # not tried again in the second turn


def test_without_a_shared_prefix_there_is_only_the_reference() -> None:
    ways = variants(tiny_example(), BUILT_IN, default_figures(), shares=False)
    assert [way.name for way in ways] == NAMES[4:]


def test_the_weights_stay_almost_as_they_are(notes: list[str]) -> None:
    """Each variant is to measure the same step."""
    example = tiny_example()
    tokens = mx.array([[5, 6, 7]])
    before = example.model(tokens)
    ways = variants(example, BUILT_IN, default_figures(), shares=True)
    list(timed_steps(example, ways, notes.append))
    assert mx.allclose(example.model(tokens), before, atol=1e-6).item()
    assert not example.model.training
