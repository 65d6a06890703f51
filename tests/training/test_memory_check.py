"""The forecast beside the peak of the training itself, and the training after it."""

import gc
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.commands import captured_display, small_run
from helpers.devices import on_cpu
from helpers.steps import encoded_pairs, model_with_lora, step_config, weights
from helpers.tiny import tiny_model, token_pair

from mlx_simpo import LoRAConfig, SimPOConfig, SimPOError, load_config, train
from mlx_simpo.engine.choice import choose_engine
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.training.memory_check import forecast_training
from mlx_simpo.training.trainer import train_steps

# Wide enough for activations to be most of the memory.
SHAPE: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "head_dim": 24,
}
PAIRS = [token_pair(20, 30 + i, 40, seed=i) for i in range(4)]


def prepared(lora: dict[str, Any], **train: Any) -> tuple[Any, SimPOConfig, Any]:
    model = tiny_model(**SHAPE)
    attach_lora(model, LoRAConfig(**lora), seed=1)
    config = step_config(**{"batch_size": 2, "steps": 2, **train})
    return model, config, choose_engine(config.train.engine, model)


@pytest.mark.parametrize(
    ("train", "lora"),
    [
        ({}, {}),
        ({"gradient_accumulation_steps": 2}, {}),
        ({"gradient_checkpointing": True}, {}),
        ({"engine": "reference"}, {}),
        ({"engine": "reference", "compile": False}, {"dropout": 0.1}),
        ({}, {"dora": True, "num_layers": 5}),
        ({"batch_size": 1, "max_tokens_per_step": 64}, {"rank": 64}),
    ],
    ids=str,
)
def test_the_forecast_is_close_to_the_peak(train: dict[str, Any], lora: dict[str, Any]) -> None:
    with on_cpu():
        model, config, engine = prepared(lora, **train)
        forecast = forecast_training(model, PAIRS, config, engine)
        gc.collect()
        mx.reset_peak_memory()
        assert len(list(train_steps(model, PAIRS, config, engine))) == 2
    # Arrays of a tiny model are few: one more or less, which depends on how busy the machine is,
    # shows. benchmarks/memory_forecast.py has real ones, within 10 %.
    assert forecast.peak == pytest.approx(mx.get_peak_memory(), rel=0.2)
    assert forecast.advice() is None


def test_twice_the_length_is_noticed() -> None:
    with on_cpu():
        model, config, engine = prepared({}, batch_size=1)
        short, long = (
            forecast_training(model, [token_pair(*sizes)], config, engine)
            for sizes in ((20, 30, 40), (40, 60, 80))
        )
    ratio = long.positions / short.positions
    assert 1.7 < ratio < 2.1  # sequences of similar length are padded
    more = (long.peak - long.weights) / (short.peak - short.weights)
    # How far MLX's CPU back end allocates ahead depends on how busy the machine is.
    assert more == pytest.approx(ratio, rel=0.25)


@pytest.mark.parametrize("engine", ["shared_prefix", "reference"])
def test_a_training_after_the_forecast_is_the_same_to_the_bit(engine: str) -> None:
    trained = []
    for is_forecast in (False, True):
        model = model_with_lora(dropout=0.2)
        config = step_config(steps=3, engine=engine, gradient_checkpointing=True)
        pairs = encoded_pairs()
        if is_forecast:
            forecast_training(model, pairs, config, choose_engine(engine, model))
        losses = [step.metrics["loss"] for step in train_steps(model, pairs, config)]
        trained.append((losses, weights(model)))
    assert trained[0][0] == trained[1][0]
    for name, array in trained[0][1].items():
        np.testing.assert_array_equal(array, trained[1][1][name])


# --- before a run ----------------------------------------------------------------------------


def begun(model_folder: Path, pairs: Path, output: Path, setting: str) -> str:
    """Train a tiny model with this train.memory_check; return what is shown."""
    display, text = captured_display()
    train(load_config(None, small_run(model_folder, pairs, output, setting)), display)
    return text.getvalue()


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a megabyte: more than the weights, and less than a training needs."""
    monkeypatch.setattr("mlx_simpo.planning.memory.memory_limit_bytes", lambda: 10**6)


@pytest.mark.usefixtures("little_memory")
def test_a_run_that_does_not_fit_is_an_error_and_leaves_nothing(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    message = r"^not enough memory: .*GB.*\. train\.memory_check=warn begins all the same$"
    with pytest.raises(SimPOError, match=message):
        begun(model_folder, pairs_file, tmp_path / "run", "train.memory_check=error")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("little_memory")
def test_a_run_that_does_not_fit_may_begin_with_a_warning_or_without(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    warned = begun(model_folder, pairs_file, tmp_path / "a", "train.memory_check=warn")
    assert "warning: not enough memory" in warned
    assert "memory" not in begun(model_folder, pairs_file, tmp_path / "b", "train.memory_check=off")


def test_an_error_of_memory_in_a_step_says_what_to_lower(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("[METAL] Command buffer execution failed: Insufficient Memory")

    monkeypatch.setattr("mlx_simpo.training.trainer.submit_update", fail)
    message = r"^not enough memory \(\[METAL\] .*Insufficient Memory.*max_tokens_per_step=\d+"
    with pytest.raises(SimPOError, match=message):
        begun(model_folder, pairs_file, tmp_path / "run", "train.memory_check=error")


def test_another_error_in_a_step_stays_as_it_is(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> Any:
        raise RuntimeError("a defect")

    monkeypatch.setattr("mlx_simpo.training.trainer.submit_update", fail)
    with pytest.raises(RuntimeError, match=r"^a defect$"):
        begun(model_folder, pairs_file, tmp_path / "run", "train.memory_check=error")
