"""A session: what it is made of, its steps, and the adapter it saves at any of them."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers.commands import arrays, assert_same_arrays, small_run, written_report
from helpers.tiny import CHATML, some_pairs, split_pairs, tiny_folder, tiny_tokenizer, write_jsonl
from mlx.utils import tree_flatten

from mlx_simpo import (
    DataConfig,
    Session,
    SimPOConfig,
    SimPOError,
    evaluate,
    evaluate_pairs,
    load_config,
    load_pairs,
    prepare,
    train,
)
from mlx_simpo.data.encode import Encoder
from mlx_simpo.training import session as session_module
from mlx_simpo.training.session import read_pairs

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


def test_the_implementation_that_was_asked_for_runs_and_is_said(made: Any) -> None:
    """On a CPU: MLX's operations, by choice or for want of a GPU, and no kernel."""
    assert "as MLX runs on the CPU" in made().engine.note
    assert "as logps.impl=mlx asks" in made("logps.impl=mlx").engine.note


@pytest.mark.parametrize("command", [prepare, evaluate])
def test_a_kernel_that_cannot_run_is_refused_before_anything_is_read(command: Any) -> None:
    settings = ["model=nobody/nothing", "data.train=none.jsonl", "data.valid=none.jsonl"]
    with pytest.raises(SimPOError, match=r"logps\.impl is kernel, but MLX runs on the CPU"):
        command(load_config(None, [*settings, "logps.impl=kernel"]))


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
    assert len(session.valid) == 0


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
    assert [q.source for q in session.quarantined] == [f"{train_file}:1", f"{valid}:3"]


def test_only_the_adapter_is_trainable(made: Any) -> None:
    session = made("lora.target_modules=[q_proj]")
    assert len(weights(session)) == 4
    assert all(".self_attn.q_proj.lora_" in name for name in weights(session))


def test_a_half_precision_model_is_told_to_be_slow(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    for dtype in ("bfloat16", "float32"):
        display, text = written_report()
        settings = small_run(model_folder, pairs_file, tmp_path / "out", f"dtype={dtype}")
        prepare(load_config(None, settings), display)
        assert ("slow on a CPU" in text.getvalue()) == (dtype == "bfloat16")


def test_data_is_read_before_the_model(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typing error in a file name does not wait for gigabytes to be fetched."""
    monkeypatch.setattr(session_module, "load_model", lambda *a, **k: pytest.fail("was loaded"))
    for setting in ("data.train", "data.valid"):
        with pytest.raises(SimPOError, match="no such file"):
            made(f"{setting}={tmp_path / 'nowhere.jsonl'}")


def test_bad_records_are_found_before_the_model_is_read(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "load_model", lambda *a, **k: pytest.fail("was loaded"))
    data = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "x"}, *some_pairs(3)])
    for setting in ("data.train", "data.valid"):
        with pytest.raises(SimPOError, match="1 of 4 records are quarantined"):
            made(f"{setting}={data}")


def test_a_second_start_reads_the_tokens_of_the_first(
    made: Any, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLX_SIMPO_CACHE", str(tmp_path / "cache"))
    first = made()
    monkeypatch.setattr(Encoder, "encode", lambda *_: pytest.fail("was encoded again"))
    second = made("seed=7", "data.valid_fraction=0.4", "data.max_quarantined=0")
    assert rows(first) != rows(second)
    train_rows, valid_rows = rows(second)
    assert sorted(train_rows + valid_rows) == list(range(12))
    notes = second.display.console.file.getvalue()
    assert f"tokens are loaded from the cache in {tmp_path / 'cache' / 'tokens'}" in notes
    (folder,) = (tmp_path / "cache" / "tokens").iterdir()
    (folder / "tokens.bin").write_bytes(b"")
    monkeypatch.undo()
    monkeypatch.setenv("MLX_SIMPO_CACHE", str(tmp_path / "cache"))
    third = made()
    assert "warning: the cached tokens in" in third.display.console.file.getvalue()
    assert rows(third) == rows(first)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_the_share_held_out_is_that_of_the_pairs(
    made: Any, tmp_path: Path, fraction: float, seed: int
) -> None:
    """With prompts that come again, and a pair that is left out only when it is encoded."""
    same = "the same words again and again " * 12
    bad = {"prompt": "P?", "chosen": f"{same}x", "rejected": f"{same}y"}
    records = [r | {"prompt": f"q{i % 9}"} for i, r in enumerate(some_pairs(30))]
    data = write_jsonl(tmp_path / "d.jsonl", [*records[:7], bad, *records[7:]])
    limits = ("data.max_length=100", "data.max_prompt_length=60")
    share = (f"data.valid_fraction={fraction}", f"seed={seed}")
    session = made(f"data.train={data}", *limits, *share)
    usable = [pair for pair in load_pairs(str(data)).pairs if pair.index != 7]
    expected = split_pairs(usable, fraction, seed)
    assert rows(session) == tuple([p.index for p in side] for side in expected)
    assert [q.source for q in session.quarantined] == [f"{data}:8"]


@pytest.mark.parametrize("given", ["data.train", "data.valid"])
def test_a_subset_of_local_data_is_an_error(made: Any, pairs_file: Path, given: str) -> None:
    with pytest.raises(SimPOError, match=r"data\.subset is 'some', but .* is local"):
        made("data.subset=some", f"{given}={pairs_file}")


@pytest.mark.parametrize(
    ("train_from", "subset"), [("owner/name", None), ("FILE", "some"), (None, "some")]
)
def test_a_subset_may_be_the_hub_datas_beside_a_file(
    pairs_file: Path, train_from: str | None, subset: str | None
) -> None:
    """A subset that nothing could belong to is never passed over."""
    train_from = str(pairs_file) if train_from == "FILE" else train_from
    data = DataConfig(train=train_from, valid=str(pairs_file), subset="some")
    config = SimPOConfig(model="m", data=data)
    if subset is None:
        assert read_pairs(config, str(pairs_file), None).source.count() == 12
    else:
        with pytest.raises(SimPOError, match=r"data\.subset is 'some'"):
            read_pairs(config, str(pairs_file), None)


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
