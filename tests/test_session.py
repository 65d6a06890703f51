"""A session: what it is made of, its steps, and the adapter it saves at any of them."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from commands import arrays, assert_same_arrays, small_run, written_report
from mlx.utils import tree_flatten
from tiny import CHATML, some_pairs, tiny_folder, tiny_tokenizer, write_jsonl

from mlx_simpo import (
    DataConfig,
    Session,
    SimPOError,
    evaluate_pairs,
    load_config,
    load_pairs,
    prepare,
    train,
)
from mlx_simpo import session as session_module
from mlx_simpo.data.encode import Encoder

TOKENS = mx.random.randint(0, 500, (2, 16), key=mx.random.key(3))
WEIGHTS = "adapters.safetensors"


@pytest.fixture
def made(model_folder: Path, pairs_file: Path, tmp_path: Path) -> Any:
    """Makes the session of a small run with these settings."""

    def make(*settings: str) -> Session:
        config = load_config(None, small_run(model_folder, pairs_file, tmp_path / "out", *settings))
        return prepare(config, written_report()[0])

    return make


def rows(session: Session) -> tuple[list[int], list[int]]:
    return [p.index for p in session.train], [p.index for p in session.valid]


def weights(session: Session) -> dict[str, np.ndarray]:
    return {n: np.array(p) for n, p in tree_flatten(session.model.trainable_parameters())}


# --- made ready ------------------------------------------------------------------------------


def test_preparing_writes_nothing(made: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    made()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_pairs_are_those_of_the_file_in_tokens(made: Any, pairs_file: Path) -> None:
    session = made("data.valid_fraction=0")
    encoder = Encoder(tiny_tokenizer(), DataConfig())
    expected = [encoder.encode(pair) for pair in load_pairs(str(pairs_file)).pairs]
    for found, pair in zip(session.train, expected, strict=True):
        assert found.chosen.tokens.tolist() == pair.chosen.tokens.tolist()
    assert session.valid == []


def test_a_share_is_held_out_and_not_trained_on(made: Any) -> None:
    train_rows, valid_rows = rows(made("data.valid_fraction=0.25"))
    assert len(valid_rows) == 3
    assert sorted(train_rows + valid_rows) == list(range(12))


def test_the_share_is_the_seeds(made: Any) -> None:
    assert rows(made("seed=1")) == rows(made("seed=1"))
    assert any(rows(made(f"seed={seed}")) != rows(made("seed=1")) for seed in (2, 3, 4))


def test_a_validation_file_takes_nothing_from_training(made: Any, tmp_path: Path) -> None:
    valid = write_jsonl(tmp_path / "valid.jsonl", some_pairs(5))
    assert rows(made(f"data.valid={valid}")) == (list(range(12)), list(range(5)))


def test_what_is_left_out_of_either_file_is_told(made: Any, tmp_path: Path) -> None:
    train_file = write_jsonl(tmp_path / "t.jsonl", [{"prompt": "x"}, *some_pairs(3)])
    valid = write_jsonl(tmp_path / "v.jsonl", [*some_pairs(2), {"prompt": "x"}])
    session = made(f"data.train={train_file}", f"data.valid={valid}", "data.max_quarantined=0.5")
    assert [q.source for q in session.left_out] == [f"{train_file}:1", f"{valid}:3"]


def test_only_the_adapter_is_trainable(made: Any) -> None:
    session = made("lora.target_modules=[q_proj]")
    assert len(weights(session)) == 4
    assert all(".self_attn.q_proj.lora_" in name for name in weights(session))


def test_a_half_precision_model_is_told_to_be_slow(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    for dtype in ("bfloat16", "float32"):
        report, text = written_report()
        settings = small_run(model_folder, pairs_file, tmp_path / "out", f"dtype={dtype}")
        prepare(load_config(None, settings), report)
        assert ("slow on a CPU" in text.getvalue()) == (dtype == "bfloat16")


def test_data_is_read_before_the_model(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typing error in a file name does not wait for gigabytes to be fetched."""
    monkeypatch.setattr(session_module, "load_model", lambda *a, **k: pytest.fail("was loaded"))
    for setting in ("data.train", "data.valid"):
        with pytest.raises(SimPOError, match="no such file"):
            made(f"{setting}={tmp_path / 'nowhere.jsonl'}")


def test_training_data_is_needed(model_folder: Path) -> None:
    with pytest.raises(SimPOError, match=r"^data\.train is missing"):
        prepare(load_config(None, [f"model={model_folder}"]), written_report()[0])


# --- steps and evaluation --------------------------------------------------------------------


def test_nothing_is_computed_until_a_step_is_asked_for(made: Any) -> None:
    session = made()
    before, steps = weights(session), session.steps()
    assert_same_arrays(weights(session), before)
    assert next(steps).step == 1
    after = weights(session)
    assert all((after[n] != before[n]).any() for n in after if n.endswith("lora_b"))


def test_all_steps_are_the_adapter_of_a_run(made: Any, tmp_path: Path) -> None:
    session = made("lora.dropout=0.2")
    assert [step.step for step in session.steps()] == [1, 2, 3]
    result = train(session.config, written_report()[0])
    saved = session.save(tmp_path / "by hand")
    assert_same_arrays(arrays(saved / WEIGHTS), arrays(result.adapter / WEIGHTS))
    for name in ("adapter_config.json", "config.yaml", "chat_template.jinja"):
        assert (saved / name).read_bytes() == (result.adapter / name).read_bytes()


def test_evaluation_is_of_the_validation_pairs_as_the_model_is_now(made: Any) -> None:
    session = made()
    before = session.evaluate()
    next(session.steps())
    after = session.evaluate()
    assert [p.index for p in after.pairs] == [p.index for p in session.valid]
    assert after.metrics["loss"] != before.metrics["loss"]
    expected = evaluate_pairs(session.model, session.valid, session.config.objective)
    assert after.metrics == pytest.approx(expected.metrics, rel=1e-5)


def test_there_may_be_nothing_to_evaluate(made: Any) -> None:
    with pytest.raises(SimPOError, match=r"no validation pairs; give data\.valid"):
        made("data.valid_fraction=0").evaluate()


# --- saved -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2])
def test_a_session_stopped_early_saves_what_it_has(stop: int, made: Any, tmp_path: Path) -> None:
    session = made("lora.dropout=0.3")
    for step in session.steps():
        if step.step == stop:
            break
    folder = session.save(tmp_path / "adapter")
    loaded = mlx_lm.load(session.config.model, adapter_path=str(folder))[0]
    expected = np.array(session.model.eval()(TOKENS))
    np.testing.assert_allclose(np.array(loaded(TOKENS)), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - np.array(mlx_lm.load(session.config.model)[0](TOKENS))).max() > 1e-3


def test_saving_on_the_way_changes_nothing(made: Any, tmp_path: Path) -> None:
    often, once = made("lora.dropout=0.3"), made("lora.dropout=0.3")
    for step in often.steps():
        often.save(tmp_path / f"step-{step.step}")
    list(once.steps())
    last = arrays(once.save(tmp_path / "once") / WEIGHTS)
    assert_same_arrays(arrays(tmp_path / "step-3" / WEIGHTS), last)
    with pytest.raises(AssertionError):
        assert_same_arrays(arrays(tmp_path / "step-1" / WEIGHTS), last)


def test_the_files_of_a_saved_adapter(made: Any, tmp_path: Path) -> None:
    session = made()
    folder = session.save(str(tmp_path / "a" / "b"))
    names = {WEIGHTS, "adapter_config.json", "config.yaml", "chat_template.jinja"}
    assert {path.name for path in folder.iterdir()} == names
    assert load_config(folder / "config.yaml") == session.config
    assert (folder / "chat_template.jinja").read_text("utf-8") == CHATML


def test_without_a_template_none_is_saved(made: Any, tmp_path: Path) -> None:
    bare = tiny_folder(tmp_path / "bare", template=None)
    folder = made(f"model={bare}").save(tmp_path / "adapter")
    assert not (folder / "chat_template.jinja").exists()
