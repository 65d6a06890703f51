"""The figures of the engine: built in by device, recorded as numbers, explained in words."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from mlx_simpo import SimPOError
from mlx_simpo.engine.figures import CPU, GPU, Figures, default_figures

FIGURES = Figures(
    41, 1312, 2**22, 2**20, "mlx", "measured in 2.1 s", "attention of a layer: 3.1 ms"
)


def test_a_record_has_the_numbers_and_not_where_they_come_from() -> None:
    record = FIGURES.as_dict()
    assert record == {
        "pass_cost": 41,
        "max_positions": 1312,
        "tile_scores": 2**22,
        "chunk_logits": 2**20,
        "attention": "mlx",
    }
    assert Figures.from_dict(record, FIGURES.source, FIGURES.evidence) == FIGURES
    least = {name: 1 if isinstance(value, int) else value for name, value in record.items()}
    assert Figures.from_dict(least, "recorded").as_dict() == least


@pytest.mark.parametrize(
    "change",
    [
        {"pass_cost": 16.0},
        {"pass_cost": True},
        {"pass_cost": 0},
        {"max_positions": -512},
        {"attention": "flash"},
        {"attention": 3},
        {"more": 1},
        {"tile_scores": None},
    ],
)
def test_a_record_of_another_form_is_an_error_that_shows_it(change: dict[str, Any]) -> None:
    values = FIGURES.as_dict() | change
    with pytest.raises(SimPOError) as error:
        Figures.from_dict(values, "recorded")
    assert str(error.value) == f"{values!r} are not figures of the engine"


@pytest.mark.parametrize("values", [None, [], "16", {}, {"pass_cost": 16}])
def test_a_record_without_all_figures_is_an_error(values: Any) -> None:
    with pytest.raises(SimPOError, match="are not figures of the engine"):
        Figures.from_dict(values, "recorded")


@pytest.mark.parametrize(("device", "figures"), [(mx.cpu, CPU), (mx.gpu, GPU)])
def test_the_device_decides_what_is_built_in(
    device: mx.DeviceType, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    assert default_figures() == figures


def test_the_built_in_numbers_are_those_that_runs_were_begun_with() -> None:
    """Others would change the last digits of every run that is begun again."""
    assert tuple(CPU.as_dict().values()) == (16, 512, 2**19, 2**24, "blocks")
    assert tuple(GPU.as_dict().values()) == (32, 4096, 2**24, 2**24, "blocks")


def test_the_note_has_the_figures_and_where_they_come_from() -> None:
    assert FIGURES.note == (
        "measured in 2.1 s: micro-batches of up to 1,312 tokens; one more forward pass costs as "
        "much as 41 tokens; attention of a layer: 3.1 ms"
    )
    assert replace(CPU, evidence="").note == (
        "built-in numbers for a CPU: micro-batches of up to 512 tokens; one more forward pass "
        "costs as much as 16 tokens"
    )
    assert replace(CPU, pass_cost=1).note.endswith(" as much as 1 token")
    assert replace(CPU, pass_cost=2).note.endswith(" as much as 2 tokens")
