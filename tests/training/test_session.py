"""A session: its data and model, its steps, and the adapter it saves after any of them."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from helpers.commands import (
    arrays,
    assert_same_arrays,
    captured_display,
    changed_copy,
    small_run,
)
from helpers.tiny import CHATML, some_pairs, tiny_folder, tiny_tokenizer, write_jsonl
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from rich.console import Console

from mlx_simpo import (
    DataConfig,
    Session,
    SimPOError,
    blas,
    evaluate,
    evaluate_pairs,
    load_config,
    load_pairs,
    prepare,
    train,
)
from mlx_simpo.data.encode import Encoder
from mlx_simpo.reporting.display import Display
from mlx_simpo.sampling.prompts import named, prompt_tokens
from mlx_simpo.training import session as session_module

TOKENS = mx.random.randint(0, 500, (2, 16), key=mx.random.key(3))
WEIGHTS = "adapters.safetensors"


@pytest.fixture
def new_session(model_folder: Path, pairs_file: Path, tmp_path: Path) -> Any:
    """A function that prepares the session of a small run with these settings."""

    def create(*settings: str, display: Display | None = None, **more: Any) -> Session:
        config = load_config(None, small_run(model_folder, pairs_file, tmp_path / "out", *settings))
        return prepare(config, display or captured_display()[0], **more)

    return create


def indices(session: Session) -> tuple[list[int], list[int]]:
    """The indices of the training pairs and of the validation pairs."""
    return [p.index for p in session.train], [p.index for p in session.valid]


def weights(session: Session) -> dict[str, np.ndarray]:
    return {n: np.array(p) for n, p in tree_flatten(session.model.trainable_parameters())}


# --- preparing -------------------------------------------------------------------------------


def test_the_chosen_implementation_is_noted(
    new_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "as logps.impl=mlx asks" in new_session("logps.impl=mlx").engine.note
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    assert "(mlx-simpo's kernel needs a GPU)" in new_session().engine.note


@pytest.mark.parametrize("command", [prepare, evaluate])
def test_a_kernel_that_cannot_run_is_an_error_before_anything_is_read(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    settings = ["model=nobody/nothing", "data.train=none.jsonl", "data.valid=none.jsonl"]
    with pytest.raises(SimPOError, match=r"logps\.impl is kernel, but MLX runs on the CPU"):
        command(load_config(None, [*settings, "logps.impl=kernel"]))


def test_memory_limits_are_set_before_anything_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    limits: list[Any] = []
    monkeypatch.setattr(session_module, "set_memory_limits", limits.append)
    settings = ["model=m", "data.train=none.jsonl", "memory.cache_limit_gb=0.5"]
    config = load_config(None, settings)
    with pytest.raises(SimPOError, match="no such file"):
        prepare(config, captured_display()[0])
    assert limits == [config.memory]


def test_the_model_is_loaded_as_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, **options: Any) -> Any:
        raise SimPOError(f"{name}: {options}")

    monkeypatch.setattr(session_module, "load_model", load)
    options = {"revision": "v2", "dtype": "float16", "trust_remote_code": True}
    config = load_config({"model": "owner/name", **options})
    with pytest.raises(SimPOError) as error:
        session_module.load_base_model(config, captured_display()[0])
    assert str(error.value) == f"owner/name: {options}"


def test_the_tokens_of_all_pairs_and_sample_prompts_are_checked(
    new_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[tuple[int, str]] = []

    def check(tokens: Any, model: Any, name: str) -> None:
        checked.append((len(tokens), name))

    monkeypatch.setattr(session_module, "check_token_ids", check)
    monkeypatch.setattr(session_module, "check_prompt_ids", check)
    sets = [
        f"{name}: {write_jsonl(tmp_path / f'{name}.jsonl', some_pairs(count))}"
        for name, count in (("a", 3), ("b", 5))
    ]
    prompts = ["Why?", "Why is the sky blue?"]
    session = new_session(f"data.valid={{{', '.join(sets)}}}", f"train.sample_prompts={prompts}")
    lengths = [len(prompt_tokens(session.encoder, prompt)) for prompt in named(prompts)]
    assert checked == [(count, session.config.model) for count in (12, 3, 5, *lengths)]


def test_evaluations_need_validation_pairs(new_session: Any) -> None:
    with pytest.raises(SimPOError) as error:
        new_session("data.valid_fraction=0", "train.eval_every=2")
    assert str(error.value) == (
        "train.eval_every is 2, but there are no validation pairs; set data.valid, or "
        "data.valid_fraction above 0"
    )


def test_preparing_writes_nothing(new_session: Any, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    new_session()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_pairs_are_those_of_the_file_in_tokens(new_session: Any, pairs_file: Path) -> None:
    session = new_session("data.valid_fraction=0")
    encoder = Encoder(tiny_tokenizer(), DataConfig())
    expected = [encoder.encode(pair) for pair in load_pairs(str(pairs_file)).pairs]
    for actual, pair in zip(session.train, expected, strict=True):
        assert actual.chosen.tokens.tolist() == pair.chosen.tokens.tolist()
        assert actual.rejected.tokens.tolist() == pair.rejected.tokens.tolist()
    assert len(session.valid) == 0


def test_a_fraction_is_held_out_and_not_trained_on(new_session: Any) -> None:
    train_indices, valid_indices = indices(new_session("data.valid_fraction=0.25"))
    assert len(valid_indices) == 3
    assert sorted(train_indices + valid_indices) == list(range(12))


def test_the_seed_decides_which_pairs_are_held_out(new_session: Any) -> None:
    assert indices(new_session("seed=1")) == indices(new_session("seed=1"))
    assert any(
        indices(new_session(f"seed={seed}")) != indices(new_session("seed=1")) for seed in (2, 3, 4)
    )


def test_a_validation_file_takes_nothing_from_training(new_session: Any, tmp_path: Path) -> None:
    valid = write_jsonl(tmp_path / "valid.jsonl", some_pairs(5))
    assert indices(new_session(f"data.valid={valid}")) == (list(range(12)), list(range(5)))


def test_quarantined_records_of_both_files_are_listed(new_session: Any, tmp_path: Path) -> None:
    train_file = write_jsonl(tmp_path / "t.jsonl", [{"prompt": "x"}, *some_pairs(3)])
    valid = write_jsonl(tmp_path / "v.jsonl", [*some_pairs(2), {"prompt": "x"}])
    session = new_session(
        f"data.train={train_file}", f"data.valid={valid}", "data.max_quarantined=0.5"
    )
    assert [q.source for q in session.quarantined] == [f"{train_file}:1", f"{valid}:3"]


def test_only_the_adapter_is_trainable(new_session: Any) -> None:
    session = new_session("lora.target_modules=[q_proj]")
    assert len(weights(session)) == 4
    assert all(".self_attn.q_proj.lora_" in name for name in weights(session))


def test_a_half_precision_model_on_a_cpu_is_warned_about(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.cpu))
    monkeypatch.setattr(blas, "missing", lambda: "it is a test")
    for dtype in ("bfloat16", "float32"):
        display, text = captured_display()
        settings = small_run(model_folder, pairs_file, tmp_path / "out", f"dtype={dtype}")
        prepare(load_config(None, settings), display)
        assert "MLX runs without OpenBLAS, which is slow: it is a test" in text.getvalue()
        assert ("slow on a CPU" in text.getvalue()) == (dtype == "bfloat16")


def test_a_window_that_is_shorter_than_the_pairs_may_be_is_warned_about(
    new_session: Any, model_folder: Path, tmp_path: Path
) -> None:
    content = json.loads((model_folder / "config.json").read_text())
    changed = json.dumps(content | {"sliding_window": 64})
    model = changed_copy(model_folder, tmp_path / "window", config__json=changed)
    for length, is_longer in ((64, False), (65, True)):
        display, text = captured_display()
        settings = ("data.max_prompt_length=32", f"data.max_length={length}")
        new_session(f"model={model}", *settings, display=display)
        warning = "warning: the model has a sliding window of 64 tokens, which mlx-lm ignores"
        assert (warning in text.getvalue()) == is_longer


def test_an_adapter_of_another_template_is_warned_about_when_a_run_begins_from_it(
    new_session: Any, bare_folder: Path, tmp_path: Path
) -> None:
    """And not read when a run goes on from its checkpoint."""
    first = new_session()
    next(first.steps())
    adapter = first.save(tmp_path / "adapter")
    settings = (f"model={bare_folder}", f"lora.init_from={adapter}")
    display, text = captured_display()
    session = new_session(*settings, display=display)
    assert_same_arrays(weights(session), weights(first))
    assert "warning: the adapter might not fit" in text.getvalue()
    assert "template" in text.getvalue()
    (adapter / "adapter_config.json").write_text("damaged")
    display, text = captured_display()
    resumed = new_session(*settings, display=display, resuming=True)
    assert "might not fit" not in text.getvalue()
    assert not all((weights(resumed)[n] == w).all() for n, w in weights(first).items())


def test_data_is_read_before_the_model(
    new_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A typo in a file name is an error before gigabytes are downloaded."""
    monkeypatch.setattr(session_module, "load_model", lambda *a, **k: pytest.fail("was loaded"))
    for setting in ("data.train", "data.valid"):
        with pytest.raises(SimPOError, match="no such file"):
            new_session(f"{setting}={tmp_path / 'nowhere.jsonl'}")


def test_bad_records_are_an_error_before_the_model_is_read(
    new_session: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "load_model", lambda *a, **k: pytest.fail("was loaded"))
    data = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "x"}, *some_pairs(3)])
    for setting in ("data.train", "data.valid"):
        with pytest.raises(SimPOError, match="1 of 4 records are quarantined"):
            new_session(f"{setting}={data}")


def test_training_data_is_needed(model_folder: Path) -> None:
    with pytest.raises(SimPOError, match=r"^data\.train is missing"):
        prepare(load_config(None, [f"model={model_folder}"]), captured_display()[0])


# --- steps and evaluation --------------------------------------------------------------------


def test_a_session_with_a_quiet_display_shows_nothing(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, small_run(model_folder, pairs_file, tmp_path / "out"))
    session = prepare(config, Display(Console(quiet=True)))
    next(session.steps())
    session.evaluate()
    session.save(tmp_path / "adapter")
    assert capsys.readouterr() == ("", "")


def test_a_model_without_a_gradient_here_is_an_error_before_training(
    new_session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_gradient(gate: mx.array, x: mx.array) -> mx.array:
        return gate * x + mx.linalg.svd(x, stream=mx.cpu)[1].sum()

    monkeypatch.setattr(llama, "swiglu", without_gradient)
    with pytest.raises(SimPOError, match=r"the model cannot be trained here: .* no gradient"):
        new_session("train.engine=reference")


def test_nothing_is_computed_until_a_step_is_asked_for(new_session: Any) -> None:
    session = new_session()
    before, steps = weights(session), session.steps()
    assert_same_arrays(weights(session), before)
    assert next(steps).step == 1
    after = weights(session)
    assert all((after[n] != before[n]).any() for n in after if n.endswith("lora_b"))


def test_all_steps_give_the_adapter_of_a_run(new_session: Any, tmp_path: Path) -> None:
    session = new_session("lora.dropout=0.2")
    assert [step.step for step in session.steps()] == [1, 2, 3]
    result = train(session.config, captured_display()[0])
    saved = session.save(tmp_path / "by hand")
    assert_same_arrays(arrays(saved / WEIGHTS), arrays(result.adapter / WEIGHTS))
    for name in ("adapter_config.json", "config.yaml", "chat_template.jinja"):
        assert (saved / name).read_bytes() == (result.adapter / name).read_bytes()


def test_evaluation_is_of_the_current_weights_on_the_validation_pairs(new_session: Any) -> None:
    session = new_session()
    before = session.evaluate()
    next(session.steps())
    after = session.evaluate()
    assert [p.index for p in after.pairs] == [p.index for p in session.valid]
    assert after.metrics["loss"] != before.metrics["loss"]
    expected = evaluate_pairs(session.model, session.valid, session.config.objective)
    assert after.metrics == pytest.approx(expected.metrics, rel=1e-5)


@pytest.mark.parametrize(("setting", "main"), [((), "a"), (("data.valid_main=b",), "b")])
def test_of_several_validation_sets_one_is_the_main_one(
    setting: tuple[str, ...], main: str, new_session: Any, tmp_path: Path
) -> None:
    sets = [
        f"{name}: {write_jsonl(tmp_path / f'{name}.jsonl', some_pairs(count))}"
        for name, count in (("a", 3), ("b", 5))
    ]
    session = new_session(f"data.valid={{{', '.join(sets)}}}", *setting)
    assert (session.valid_main, session.valid) == (main, session.valid_sets[main])
    results = session.evaluate_sets()
    assert {name: len(result.pairs) for name, result in results.items()} == {"a": 3, "b": 5}
    assert session.evaluate().metrics == results[main].metrics


class TitledDisplay(Display):
    """Shows nothing, and remembers titles and numbers of progress bars."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.bars: list[tuple[str, int, list[int]]] = []

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
        self.bars.append((title, total, []))
        yield self.bars[-1][2].append


def test_the_progress_of_evaluations_is_shown_and_checked_after_each_batch(
    new_session: Any, tmp_path: Path
) -> None:
    """Whose sizes are those of the settings."""
    display, checks = TitledDisplay(), []
    valid = write_jsonl(tmp_path / "valid.jsonl", some_pairs(5))
    session = new_session(f"data.valid={valid}", display=display)
    display.bars.clear()
    session.evaluate(check=lambda: checks.append(len(display.bars[0][2])))
    assert display.bars == [("Evaluating", 5, [2, 2, 1])]
    assert checks == [1, 2, 3]
    session = new_session(
        f"data.valid={{a: {valid}}}", "train.max_tokens_per_step=1", display=display
    )
    display.bars.clear()
    session.evaluate_sets("Before")
    assert display.bars == [("Before (a)", 5, [1] * 5)]


def test_evaluating_needs_validation_pairs(new_session: Any) -> None:
    with pytest.raises(SimPOError, match=r"no validation pairs; set data\.valid, or data\.valid_f"):
        new_session("data.valid_fraction=0").evaluate()


# --- saved -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 2])
def test_a_session_stopped_early_saves_the_current_adapter(
    stop: int, new_session: Any, tmp_path: Path
) -> None:
    session = new_session("lora.dropout=0.3")
    for step in session.steps():
        if step.step == stop:
            break
    folder = session.save(tmp_path / "adapter")
    loaded = mlx_lm.load(session.config.model, adapter_path=str(folder))[0]
    expected = np.array(session.model.eval()(TOKENS))
    np.testing.assert_allclose(np.array(loaded(TOKENS)), expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - np.array(mlx_lm.load(session.config.model)[0](TOKENS))).max() > 1e-3


def test_saving_between_steps_changes_nothing(new_session: Any, tmp_path: Path) -> None:
    often, once = new_session("lora.dropout=0.3"), new_session("lora.dropout=0.3")
    for step in often.steps():
        often.save(tmp_path / f"step-{step.step}")
    list(once.steps())
    last = arrays(once.save(tmp_path / "once") / WEIGHTS)
    assert_same_arrays(arrays(tmp_path / "step-3" / WEIGHTS), last)
    with pytest.raises(AssertionError):
        assert_same_arrays(arrays(tmp_path / "step-1" / WEIGHTS), last)


def test_the_files_of_a_saved_adapter(new_session: Any, tmp_path: Path) -> None:
    session = new_session()
    folder = session.save(str(tmp_path / "a" / "b"))
    names = {WEIGHTS, "adapter_config.json", "config.yaml", "chat_template.jinja"}
    assert {path.name for path in folder.iterdir()} == names
    assert load_config(folder / "config.yaml") == session.config
    content = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    assert content == {
        "model": session.config.model,
        "mlx_simpo": session.record,
        **session.adapter,
    }
    assert (folder / "chat_template.jinja").read_text("utf-8") == CHATML


def test_without_a_template_none_is_saved(new_session: Any, tmp_path: Path) -> None:
    model = tiny_folder(tmp_path / "model", template=None)
    folder = new_session(f"model={model}").save(tmp_path / "adapter")
    assert not (folder / "chat_template.jinja").exists()


def test_prompts_in_training_and_validation_are_warned_of(
    model_folder: Path, tmp_path: Path
) -> None:
    """Near ones straddle held-out pairs, too; a resumed run has told it before."""
    rows = some_pairs(8)
    train = [
        write_jsonl(tmp_path / f"{name}.jsonl", part)
        for name, part in (("a", rows[:4]), ("b", rows[4:7]))
    ]
    valid = write_jsonl(
        tmp_path / "v.jsonl", [rows[7], {**rows[5], "prompt": rows[5]["prompt"].upper()}]
    )
    config = load_config(
        None,
        [
            f"model={model_folder}",
            f"data.train=[{', '.join(f'{{path: {path}}}' for path in train)}]",
            f"data.valid={{clean: {write_jsonl(tmp_path / 'c.jsonl', rows[7:])}, chat: {valid}}}",
        ],
    )
    warnings = []
    for resuming in (False, True):
        display, text = captured_display()
        prepare(config, display, resuming=resuming)
        warnings.append([line for line in text.getvalue().splitlines() if "prompt that is" in line])
    assert warnings == [
        [
            "warning: 1 of 2 pairs of the validation set 'chat' (50.0%) have a prompt that is in "
            f"the training pairs, too, e.g. {valid}:2 and {train[1]}:2; their accuracy says how "
            "well they are memorized: remove these prompts from one of the two "
            "(`mlx-simpo data inspect` lists them)"
        ],
        [],
    ]


def test_held_out_pairs_that_are_nearly_trained_on_are_warned_of(
    model_folder: Path, tmp_path: Path
) -> None:
    words = " ".join(f"word{n}" for n in range(40))
    rows = [{"prompt": f"{words} {n}", "chosen": "yes", "rejected": "no"} for n in range(4)]
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    display, text = captured_display()
    prepare(load_config(None, [f"model={model_folder}", f"data.train={data}"]), display)
    assert "1 of 1 pairs to evaluate on (100.0%) have a prompt that is in the" in text.getvalue()
    assert "all of them nearly" in text.getvalue()
