"""The forecast and its advice, where the memory of a micro-batch is known exactly."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers.forecasts import Law, model_of, resident
from helpers.steps import step_config
from helpers.tiny import token_pair

from mlx_simpo import DataConfig, MemoryConfig, SimPOError, TrainConfig
from mlx_simpo.data.encode import EncodedPair
from mlx_simpo.engine.choice import REFERENCE
from mlx_simpo.planning import memory
from mlx_simpo.planning.memory import (
    COMFORTABLE_SHARE,
    MemoryForecast,
    check_weights,
    forecast_memory,
    gigabytes,
    weight_bytes,
)

LAYERS = 8
PAIRS = [
    replace(token_pair(32, 64 + i, 64, seed=i), index=i, source=f"pairs:{i + 1}") for i in range(16)
]
LONG = replace(token_pair(128, 256, 128), index=16, source="pairs:17")


class Machine:
    """A machine with ``limit`` bytes, on which a micro-batch takes what a law says, and half of it
    per layer with gradient checkpointing."""

    def __init__(self, model: nn.Module, limit: Callable[[Law], float]) -> None:
        self.law = Law(model, per_layer=lambda tokens: 1e4 * tokens)
        self.thrifty = Law(model, per_layer=lambda tokens: 5e3 * tokens)
        self.limit = round(limit(self.law))
        self.tried: list[TrainConfig] = []

    def __call__(self, pairs: Sequence[EncodedPair], options: TrainConfig) -> None:
        if options not in self.tried:
            self.tried.append(options)
        (self.thrifty if options.gradient_checkpointing else self.law)(pairs)
        taken = max([*self.law.taken, *self.thrifty.taken])
        assert taken <= self.limit


def forecast(
    limit: Callable[[Law], float],
    monkeypatch: pytest.MonkeyPatch,
    pairs: Sequence[EncodedPair] = PAIRS,
    **train: Any,
) -> tuple[MemoryForecast, Machine]:
    """The forecast of a training of 8 layers, on a machine of that limit."""
    model = model_of(LAYERS)
    in_use = resident(model, 3)
    machine = Machine(model, lambda law: in_use + limit(law))
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: machine.limit)
    config = step_config(**{"batch_size": 8, "gradient_accumulation_steps": 2, **train})
    return forecast_memory(model, pairs, config, REFERENCE, 2, machine), machine


def settings_of(remedy: str) -> dict[str, str]:
    """The settings in a remedy by their names."""
    words = [word.strip(",;") for word in remedy.split()]
    return dict(word.split("=") for word in words if "=" in word)


# --- forecast and remedies -------------------------------------------------------------------


def test_a_training_that_fits_has_figures_and_no_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    result, machine = forecast(lambda law: 2 * law.bytes(PAIRS, LAYERS), monkeypatch)
    assert result.advice() is None
    assert result.remedy == ""
    assert (result.pairs, result.source) == (8, "pairs:16")
    assert result.limit == machine.limit
    assert machine.tried == [step_config(batch_size=8, gradient_accumulation_steps=2).train]


def test_the_peak_is_that_of_the_largest_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    result, machine = forecast(lambda law: 2 * law.bytes(PAIRS, LAYERS), monkeypatch)
    largest = PAIRS[8:]
    assert result.positions == REFERENCE.collate(largest).positions
    expected = resident(machine.law.model, 3) + machine.law.bytes(largest, LAYERS)
    assert result.peak == pytest.approx(expected, rel=1e-3)
    assert result.weights == weight_bytes(machine.law.model)


def test_smaller_micro_batches_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    result, machine = forecast(lambda law: law.bytes(PAIRS[8:13], LAYERS), monkeypatch)
    settings = settings_of(result.remedy)
    assert settings.keys() == {"train.max_tokens_per_step"}
    tokens = int(settings["train.max_tokens_per_step"])
    assert tokens % 64 == 0
    with pytest.raises(SimPOError, match=rf"set train.max_tokens_per_step={tokens} \(about"):
        result.advice()
    # With the setting it fits, and not by far too much.
    result = forecast_memory(
        machine.law.model,
        PAIRS,
        step_config(batch_size=8, gradient_accumulation_steps=2, max_tokens_per_step=tokens),
        REFERENCE,
        2,
        machine,
    )
    assert 0.5 * machine.limit < result.peak <= COMFORTABLE_SHARE * machine.limit


def test_a_long_pair_needs_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [*PAIRS[:-1], LONG]
    result, _ = forecast(lambda law: 0.7 * law.bytes([LONG], LAYERS), monkeypatch, pairs)
    settings = settings_of(result.remedy)
    assert settings["train.gradient_checkpointing"] == "true"
    assert settings.keys() <= {"train.gradient_checkpointing", "train.max_tokens_per_step"}


def test_a_pair_that_is_too_long_even_so_is_to_be_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = forecast(
        lambda law: 0.3 * law.bytes([LONG], LAYERS), monkeypatch, [LONG], batch_size=1
    )
    settings = settings_of(result.remedy)
    assert settings["train.gradient_checkpointing"] == "true"
    length = int(settings["data.max_length"])
    assert 0.4 * LONG.length < length < 0.7 * LONG.length
    assert int(settings["data.max_prompt_length"]) == length // 2  # 512 would not be less
    assert DataConfig(max_length=length, max_prompt_length=length // 2)


def test_settings_that_the_run_has_are_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    result, machine = forecast(
        lambda law: 0.5 * law.bytes([LONG], LAYERS),
        monkeypatch,
        [LONG] * 2,
        batch_size=1,
        gradient_checkpointing=True,
    )
    assert settings_of(result.remedy).keys() == {"data.max_length", "data.max_prompt_length"}
    assert len(machine.tried) == 1


def test_nothing_helps_where_the_model_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(LAYERS)
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: 1000)
    config = step_config()
    result = forecast_memory(model, PAIRS, config, REFERENCE, 1, lambda pairs, options: None)
    assert result.remedy == ""
    with pytest.raises(SimPOError, match="use a smaller model, or one that is quantized"):
        result.advice()


# --- messages --------------------------------------------------------------------------------

FORECAST = MemoryForecast(
    peak=9_310_000_000,
    limit=10_000_000_000,
    weights=4_280_000_000,
    positions=4096,
    pairs=8,
    source="train.jsonl:17",
    remedy="set train.max_tokens_per_step=2048 (about 6.9 GB)",
)


def test_the_warning_has_the_figures_and_what_to_set() -> None:
    assert FORECAST.advice() == (
        "memory will be tight: training needs about 9.31 GB of 10 GB (the weights take 4.28 GB; "
        "the largest micro-batch has 4096 positions in 8 pairs, the longest of them from "
        "train.jsonl:17); to be safe, set train.max_tokens_per_step=2048 (about 6.9 GB)"
    )


def test_the_error_is_one_line_with_the_same_figures() -> None:
    with pytest.raises(SimPOError) as caught:
        replace(FORECAST, limit=9_000_000_000).advice()
    assert str(caught.value) == (
        "not enough memory: training needs about 9.31 GB of 9 GB (the weights take 4.28 GB; the "
        "largest micro-batch has 4096 positions in 8 pairs, the longest of them from "
        "train.jsonl:17); set train.max_tokens_per_step=2048 (about 6.9 GB)"
    )


def test_a_limit_that_is_set_is_named_and_can_be_raised() -> None:
    with pytest.raises(SimPOError) as caught:
        replace(FORECAST, limit=9_000_000_000, is_limit_set=True).advice()
    assert "needs about 9.31 GB of the 9 GB of memory.limit_gb (the weights" in str(caught.value)
    assert str(caught.value).endswith("=2048 (about 6.9 GB), or raise memory.limit_gb")


@pytest.mark.parametrize(("peak", "is_warned"), [(8_999_999_999, False), (9_000_000_001, True)])
def test_nine_tenths_of_the_limit_are_comfortable(peak: int, is_warned: bool) -> None:
    assert (replace(FORECAST, peak=peak).advice() is not None) == is_warned


def test_one_pair_is_singular() -> None:
    assert "90 positions in 1 pair, " in replace(FORECAST, pairs=1, positions=90).figures


def test_gigabytes_have_three_digits() -> None:
    assert [gigabytes(n) for n in (1.2345e11, 1.2345e10, 1.2345e9, 1.2345e7)] == [
        "123 GB",
        "12.3 GB",
        "1.23 GB",
        "0.0123 GB",
    ]


# --- weights ---------------------------------------------------------------------------------


def test_weights_are_checked_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    before = mx.get_active_memory()
    model = nn.Linear(30_000, 30_000, bias=False)  # 3.6 GB, not computed
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: 3_600_000_000)
    check_weights(model, MemoryConfig())
    monkeypatch.setattr(memory, "memory_limit_bytes", lambda: 3_599_999_999)
    with pytest.raises(SimPOError, match=r"weights take 3.6 GB of 3.6 GB; use a smaller model"):
        check_weights(model, MemoryConfig())
    assert mx.get_active_memory() - before < 1e6
