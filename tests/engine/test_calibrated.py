"""When a run measures, and what it takes over from the runs before it."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.devices import on_stand_in_gpu
from helpers.steps import encoded_pairs, model_with_lora, step_config

from mlx_simpo import EngineConfig, LogpsConfig, LoRAConfig, SimPOConfig
from mlx_simpo.engine import calibrated
from mlx_simpo.engine.calibrated import calibration_folder, load_or_calibrate, run_engine
from mlx_simpo.engine.calibration import Calibration
from mlx_simpo.engine.choice import REFERENCE
from mlx_simpo.engine.figures import CPU, Figures, default_figures
from mlx_simpo.engine.trial_shapes import Lengths

CONFIG = replace(step_config(), logps=LogpsConfig("mlx"))
LENGTHS = Lengths(16, 32)


def measured(number: int) -> Calibration:
    figures = Figures(40 + number, 1000, 2**19, 2**20, "blocks", "measured in 2.1 s", "blocks 3 ms")
    return Calibration(figures, 2.1, 0.004, 1e-4, 2e-4, 48, True)


@pytest.fixture
def measurements(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Lengths]:
    """The lengths of the calibrations so far, in a cache of their own; each has other figures."""
    monkeypatch.setenv("MLX_SIMPO_CACHE", str(tmp_path / "cache"))
    lengths_so_far: list[Lengths] = []

    def calibrate(model: Any, config: SimPOConfig, lengths: Lengths) -> Calibration:
        lengths_so_far.append(lengths)
        return measured(len(lengths_so_far))

    monkeypatch.setattr(calibrated, "calibrate", calibrate)
    return lengths_so_far


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrated, "is_gpu", lambda: True)


# --- whether it is measured ------------------------------------------------------------------


def test_on_a_gpu_the_figures_are_measured_and_the_engine_goes_by_them(
    measurements: list[Lengths],
) -> None:
    with on_stand_in_gpu():
        engine = run_engine(CONFIG, model_with_lora(), encoded_pairs())
    assert len(measurements) == 1
    assert engine.figures == measured(1).figures
    assert engine.note.endswith(
        "; measured in 2.1 s: micro-batches of up to 1,000 tokens; one more forward pass costs "
        "as much as 41 tokens; blocks 3 ms"
    )
    groups = engine.collate(encoded_pairs()[:2]).arrays[1]
    assert len(groups) == 1  # all within 41 positions of each other


def test_on_a_cpu_the_built_in_numbers_stay(
    measurements: list[Lengths], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibrated, "is_gpu", lambda: False)
    engine = run_engine(CONFIG, model_with_lora(), encoded_pairs())
    assert measurements == []
    assert engine.figures == default_figures()
    assert default_figures().note in engine.note


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(
    "config",
    [
        replace(CONFIG, engine=EngineConfig(calibration="off")),
        step_config(engine="reference"),
    ],
)
def test_nothing_is_measured_that_is_turned_off_or_has_no_use(
    config: SimPOConfig, measurements: list[Lengths]
) -> None:
    engine = run_engine(config, model_with_lora(), encoded_pairs())
    assert measurements == []
    assert engine.figures == (None if engine is REFERENCE else default_figures())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_model_that_takes_the_reference_is_not_measured(
    measurements: list[Lengths], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_simpo.engine.choice.reason_not_shareable", lambda model: "of a test")
    engine = run_engine(CONFIG, model_with_lora(), encoded_pairs())
    assert (engine.name, engine.figures, measurements) == ("reference", None, [])


@pytest.mark.usefixtures("as_on_a_gpu")
def test_recorded_figures_are_taken_and_nothing_is_measured(measurements: list[Lengths]) -> None:
    figures = replace(CPU, pass_cost=7, source="recorded by the run")
    engine = run_engine(CONFIG, model_with_lora(), encoded_pairs(), figures)
    assert (engine.figures, measurements) == (figures, [])
    assert f"; {figures.note}" in engine.note
    assert figures.note.startswith("recorded by the run: ")


# --- the cache -------------------------------------------------------------------------------


def test_a_second_run_takes_what_the_first_has_measured(measurements: list[Lengths]) -> None:
    first = load_or_calibrate(model_with_lora(), CONFIG, LENGTHS)
    second = load_or_calibrate(model_with_lora(), CONFIG, LENGTHS)
    assert (first, len(measurements)) == (measured(1), 1)
    source = "measured earlier on this machine"
    assert second == replace(first, figures=replace(first.figures, source=source))


@pytest.mark.parametrize(
    "change",
    [
        {"config": replace(CONFIG, engine=EngineConfig(attention="blocks"))},
        {"config": replace(CONFIG, logps=LogpsConfig("auto"))},
        {"config": replace(CONFIG, lora=LoRAConfig(dropout=0.1))},
        {"config": replace(CONFIG, train=replace(CONFIG.train, gradient_checkpointing=True))},
        {"config": replace(CONFIG, train=replace(CONFIG.train, max_tokens_per_step=512))},
        {"lengths": Lengths(16, 45)},
        {"lora": {"target_modules": ("q_proj",)}},
    ],
)
def test_another_kind_of_training_is_measured_by_itself(
    change: dict[str, Any], measurements: list[Lengths]
) -> None:
    load_or_calibrate(model_with_lora(), CONFIG, LENGTHS)
    model = model_with_lora(**change.pop("lora", {}))
    arguments = {"config": CONFIG, "lengths": LENGTHS, **change}
    load_or_calibrate(model, **arguments)
    load_or_calibrate(model, **arguments)
    assert len(measurements) == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", lambda name: "0.99" if name == "mlx" else "1"),
        ("processor", lambda: "Apple M9"),
        ("memory_limit_bytes", lambda: 2**40),
        ("FORMAT", 0),
    ],
)
def test_another_version_or_machine_is_measured_by_itself(
    name: str, value: Any, measurements: list[Lengths], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_or_calibrate(model_with_lora(), CONFIG, LENGTHS)
    monkeypatch.setattr(calibrated, name, value)
    load_or_calibrate(model_with_lora(), CONFIG, LENGTHS)
    assert len(measurements) == 2


DAMAGE: list[Callable[[str], str]] = [
    lambda text: "",
    lambda text: text[: len(text) // 2],
    lambda text: "[]",
    lambda text: "{}",
    lambda text: text.replace('"pass_cost": 41', '"pass_cost": 47'),
    lambda text: text.replace('"pass_s": 0.004', '"pass_s": "0.004"'),
    lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "sha256"}),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_measured_again_and_replaced(
    damage: Callable[[str], str], measurements: list[Lengths]
) -> None:
    load_or_calibrate(model_with_lora(), CONFIG, LENGTHS)
    (path,) = calibration_folder().iterdir()
    whole = path.read_text("utf-8")
    assert damage(whole) != whole
    path.write_text(damage(whole), encoding="utf-8")
    assert load_or_calibrate(model_with_lora(), CONFIG, LENGTHS) == measured(2)
    assert load_or_calibrate(model_with_lora(), CONFIG, LENGTHS).figures.pass_cost == 42
    assert list(calibration_folder().iterdir()) == [path]
    assert len(measurements) == 2


def test_the_file_of_another_key_is_not_taken(measurements: list[Lengths]) -> None:
    """Somebody has copied it there: its checksum is right."""
    load_or_calibrate(model_with_lora(), CONFIG, LENGTHS)
    (first,) = calibration_folder().iterdir()
    content = first.read_bytes()
    load_or_calibrate(model_with_lora(), CONFIG, Lengths(32, 64))
    (second,) = set(calibration_folder().iterdir()) - {first}
    second.write_bytes(content)
    result = load_or_calibrate(model_with_lora(), CONFIG, Lengths(32, 64))
    assert (result, len(measurements)) == (measured(3), 3)


def test_what_could_not_be_measured_is_not_kept(
    measurements: list[Lengths], monkeypatch: pytest.MonkeyPatch
) -> None:
    incomplete = replace(measured(1), is_complete=False)
    monkeypatch.setattr(calibrated, "calibrate", lambda *_: incomplete)
    assert load_or_calibrate(model_with_lora(), CONFIG, LENGTHS) == incomplete
    assert not calibration_folder().exists()


def test_a_cache_that_cannot_be_written_is_mentioned(
    measurements: list[Lengths], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    figures = load_or_calibrate(model_with_lora(), CONFIG, LENGTHS).figures
    assert figures.as_dict() == measured(1).figures.as_dict()
    assert figures.source.startswith("measured in 2.1 s, and not kept for the next run (")
    assert "Not a directory" in figures.source or "File exists" in figures.source
