"""What is measured becomes figures, and nothing else: on the tiny model, and with planted costs."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.clock import FakeClock
from helpers.fused import fused_attention_stand_in
from helpers.steps import encoded_pairs, model_with_lora, step_config, weights

from mlx_simpo import EngineConfig, LogpsConfig, SimPOConfig
from mlx_simpo.engine import calibration as module
from mlx_simpo.engine.attention_timing import AttentionTiming
from mlx_simpo.engine.calibration import (
    MAX_PASS_COST,
    MAX_POSITIONS,
    Calibration,
    calibrate,
    calibration_table,
)
from mlx_simpo.engine.choice import shared_prefix_engine
from mlx_simpo.engine.figures import CPU, GPU, Figures, default_figures
from mlx_simpo.engine.head_timing import HeadCosts
from mlx_simpo.engine.pass_timing import PassTiming
from mlx_simpo.engine.stopwatch import Measurement, Stopwatch
from mlx_simpo.engine.trial_shapes import Lengths, Shape, shape_of, typical_lengths
from mlx_simpo.model.adapters import flat_arrays

LENGTHS = Lengths(16, 24)
CONFIG = step_config()


def planted(
    monkeypatch: pytest.MonkeyPatch,
    pass_s: float,
    position_s: float,
    sizes: Sequence[int] = (64, 512, 4096),
    position_bytes: int = 0,
    head: HeadCosts | None = None,
) -> Calibration:
    """What calibration makes of measurements that were planted."""

    def time_passes(*_: Any) -> list[PassTiming]:
        shapes = [shape_of(size, LENGTHS) for size in sizes]
        return [
            PassTiming(
                s,
                Measurement(
                    s.passes * pass_s + s.positions * position_s, s.positions * position_bytes
                ),
            )
            for s in shapes
        ]

    monkeypatch.setattr(module, "time_passes", time_passes)
    monkeypatch.setattr(module, "time_head", lambda *_: head)
    return calibrate(model_with_lora(), CONFIG, LENGTHS, 3.0, FakeClock())


# --- on a model ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        step_config(gradient_checkpointing=True),
        replace(CONFIG, engine=EngineConfig(attention="blocks")),
    ],
)
def test_the_tiny_model_is_measured_and_left_as_it_was(config: SimPOConfig) -> None:
    model = model_with_lora(dropout=0.1)
    model.eval()
    layers = [type(layer) for layer in model.layers]
    before, state = weights(model), np.array(mx.random.state[0])  # type: ignore[index]
    engine = shared_prefix_engine(model)
    arrays = engine.collate(encoded_pairs()[:2]).arrays
    logps = np.array(engine.logps(model, arrays, training=False))
    result = calibrate(model, config, typical_lengths(encoded_pairs()), budget_s=30.0)
    assert result.seconds > 0
    assert result.row_s is not None
    assert result.row_s > 0
    assert not model.training
    assert [type(layer) for layer in model.layers] == layers
    after = weights(model)
    assert after.keys() == before.keys()
    assert all((after[name] == before[name]).all() for name in before)
    np.testing.assert_array_equal(np.array(mx.random.state[0]), state)  # type: ignore[index]
    np.testing.assert_array_equal(engine.logps(model, arrays, training=False), logps)
    weight_bytes = sum(array.nbytes for array in flat_arrays(model.parameters()).values())
    assert mx.get_peak_memory() < mx.get_active_memory() + weight_bytes + 10**6


def test_measuring_twice_draws_no_random_numbers_between_runs() -> None:
    """Dropout is drawn while it is measured: the run's own numbers must not notice."""
    model = model_with_lora(dropout=0.5)
    mx.random.seed(3)
    expected = mx.random.normal((3,)).tolist()
    mx.random.seed(3)
    calibrate(model, CONFIG, LENGTHS, budget_s=0.3)
    assert mx.random.normal((3,)).tolist() == expected


def test_no_micro_batch_is_larger_than_the_run_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    original = module._gradient_work

    def recording(model: Any, engine: Any, shape: Any, *options: Any) -> Any:
        shapes.append(shape)
        return original(model, engine, shape, *options)

    monkeypatch.setattr(module, "_gradient_work", recording)
    calibrate(model_with_lora(), step_config(max_tokens_per_step=300), LENGTHS, budget_s=3.0)
    assert max(shape.positions for shape in shapes) in range(200, 301)


@pytest.mark.parametrize(
    ("figures", "max_tokens_per_step", "lengths", "pairs"),
    [
        (CPU, None, LENGTHS, 8),  # of 64 positions each
        (GPU, None, LENGTHS, 64),
        (GPU, 300, LENGTHS, 4),
        (GPU, 300, Lengths(300, 400), 1),
    ],
)
def test_attention_is_timed_in_micro_batches_as_large_as_the_runs(
    figures: Figures,
    max_tokens_per_step: int | None,
    lengths: Lengths,
    pairs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shapes = []

    def time_attention(watch: Any, model: Any, shape: Any, *_: Any) -> list[AttentionTiming]:
        shapes.append(shape)
        return []

    monkeypatch.setattr(module, "default_figures", lambda: figures)
    monkeypatch.setattr(module, "time_attention", time_attention)
    config = step_config(max_tokens_per_step=max_tokens_per_step)
    calibrate(model_with_lora(), config, lengths, 0.0, FakeClock())
    assert shapes == [Shape(pairs, lengths)]


def test_a_warm_up_that_takes_the_whole_budget_is_all_that_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, runs = FakeClock(), []

    def slow(*_: Any) -> Any:
        def run() -> list:
            runs.append(1)
            clock.now += 4.0
            return []

        return run

    monkeypatch.setattr(module, "_gradient_work", slow)
    result = calibrate(model_with_lora(), CONFIG, LENGTHS, 3.0, clock)
    assert (len(runs), result.seconds, result.is_complete) == (1, 4.0, False)
    assert result.figures.as_dict() == default_figures().as_dict()
    assert result.figures.source == (
        f"{default_figures().source}, because 4.0 s were enough for the warm-up only"
    )
    assert calibration_table(result, 4) == []


@pytest.mark.parametrize("budget_s", [0.05, 0.1, 0.3, 1.0, 3.0])
def test_the_budget_is_never_exceeded(budget_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is measured takes 0.05 s here."""
    clock, once = FakeClock(), Stopwatch.once

    def slow(self: Stopwatch, work: Any) -> Measurement:
        clock.now += 0.05
        return once(self, work)._replace(seconds=0.05)

    monkeypatch.setattr(Stopwatch, "once", slow)
    result = calibrate(model_with_lora(), CONFIG, LENGTHS, budget_s, clock)
    assert 0.05 <= clock.now <= budget_s + 1e-9
    assert result.seconds == clock.now


def test_passes_are_timed_with_the_attention_that_was_quicker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timings = [AttentionTiming("mlx", 2**19, 0.001, 1), AttentionTiming("blocks", 2**19, 0.002, 1)]
    monkeypatch.setattr(module, "time_attention", lambda *_: timings)
    model, config = model_with_lora(), replace(CONFIG, logps=LogpsConfig("mlx"))
    with fused_attention_stand_in() as stand_in:
        calibrate(model, config, LENGTHS, 1.0, FakeClock())
        stand_in.backward.clear()  # what is checked before is checked once
        result = calibrate(model, config, LENGTHS, 1.0, FakeClock())
    assert result.figures.attention == "mlx"
    assert result.figures.evidence == (
        "attention of a layer: MLX's fused 1.0 ms and 0.00 GB against blocks 2.0 ms and 0.00 GB"
    )
    assert (24, 40, "causal") in [(q, k, str(mask)) for q, k, mask in stand_in.backward]


# --- from measurements to figures ------------------------------------------------------------


def test_figures_are_the_costs_that_were_planted(monkeypatch: pytest.MonkeyPatch) -> None:
    result = planted(monkeypatch, 0.004, 1e-4, head=HeadCosts(2e-4, 2**20))
    assert result.pass_s == pytest.approx(0.004)
    assert result.position_s == pytest.approx(1e-4)
    assert (result.row_s, result.is_complete) == (2e-4, True)
    figures = result.figures
    assert (figures.pass_cost, figures.max_positions) == (40, 32 * 40)
    assert figures.chunk_logits == 2**20
    assert figures.source == "measured in 0.0 s"


@pytest.mark.parametrize(
    ("pass_s", "pass_cost", "max_positions"),
    [
        (0.0, 1, 64),  # a pass costs nothing: 1, so that equal costs prefer fewer passes
        (3e-4, 3, 96),
        (0.05, 500, 16_000),
        (10.0, MAX_PASS_COST, MAX_POSITIONS),
    ],
)
def test_figures_stay_within_bounds(
    pass_s: float, pass_cost: int, max_positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = planted(monkeypatch, pass_s, 1e-4).figures
    assert (figures.pass_cost, figures.max_positions) == (pass_cost, max_positions)


def test_a_micro_batch_fits_into_memory_beside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 GB are free, of which two micro-batches take half: 1,000 positions of 1 MB each."""
    free = mx.get_active_memory() + 4 * 10**9
    monkeypatch.setattr(module, "memory_limit_bytes", lambda: free)
    figures = planted(monkeypatch, 0.004, 1e-4, position_bytes=10**6).figures
    assert figures.pass_cost == 40
    assert figures.max_positions == pytest.approx(1000, rel=0.02)


@pytest.mark.parametrize("pass_s", [-0.1, float("nan"), float("inf")])
def test_without_a_line_the_figures_are_built_in_and_say_what_was_measured(
    pass_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = planted(monkeypatch, pass_s, 1e-2)
    assert result.figures.as_dict() == default_figures().as_dict()
    assert (result.pass_s, result.is_complete) == (None, False)
    first = 2 * pass_s + 0.64
    measured = f"as on a busy machine (64 positions in 2 passes took {first:.3g} s, 512 "
    assert measured in result.figures.source
    assert calibration_table(result, 4) == []


def test_of_one_size_the_built_in_ratio_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = default_figures().pass_cost
    result = planted(monkeypatch, 0.0, 0.01, sizes=[64], head=HeadCosts(1e-3, None))
    assert (result.figures.pass_cost, result.is_complete) == (cost, False)
    assert result.position_s == pytest.approx(0.64 / (64 + 2 * cost))
    assert result.pass_s == pytest.approx(cost * 0.64 / (64 + 2 * cost))
    assert (
        "gave micro-batches of one size only (64 positions in 2 passes took 0.64 s)"
        in result.figures.source
    )
    assert len(calibration_table(result, 4)) == 4


# --- the table -------------------------------------------------------------------------------


def test_the_table_adds_up_passes_positions_and_the_head() -> None:
    figures = replace(CPU, max_positions=1000)
    rows = calibration_table(Calibration(figures, 2.0, 0.05, 0.001, 0.002, 300, True), 4)
    assert [row["tokens"] for row in rows] == [64, 256, 1024, 4096]
    # 64 tokens: 32 of prompt, twice 32 of response; four pairs share two passes.
    assert rows[0]["pairs"] == 4
    assert rows[0]["seconds_per_pair"] == pytest.approx(0.1 / 4 + 96 * 0.001 + 64 * 0.002)
    assert rows[0]["pairs_per_hour"] == pytest.approx(3600 / rows[0]["seconds_per_pair"])
    # 256 tokens: 384 positions, of which two pairs fit into 1,000.
    assert rows[1]["pairs"] == 2
    assert rows[3]["pairs"] == 1
    assert rows[3]["seconds_per_pair"] == pytest.approx(0.1 + 6144 * 0.001 + 4096 * 0.002)
    assert [row["is_extrapolated"] for row in rows] == [False, False, True, True]


def test_without_the_heads_cost_there_is_no_table() -> None:
    assert calibration_table(Calibration(CPU, 2.0, 0.05, 0.001, None, 300, True), 4) == []
