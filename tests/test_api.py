"""Whole runs: their files, their repeatability, errors and Ctrl-C; evaluate, generate, inspect."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from helpers.commands import (
    arrays,
    assert_same_arrays,
    captured_display,
    changed_copy,
    json_lines,
    small_run,
)
from helpers.tiny import (
    CHATML,
    some_pairs,
    split_pairs,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
    write_jsonl,
)
from mlx.utils import tree_flatten
from mlx_lm.models.llama import MLP

from mlx_simpo import (
    DataConfig,
    ObjectiveConfig,
    SimPOConfig,
    SimPOError,
    TrainResult,
    evaluate,
    evaluate_pairs,
    generate,
    inspect,
    load_config,
    load_pairs,
    prepare,
    train,
)
from mlx_simpo.data.encode import Encoder, encode_pairs
from mlx_simpo.evaluation import Evaluation
from mlx_simpo.training import session as session_module
from mlx_simpo.training.trainer import train_steps

STEPS = 4
MEMORY = ("peak_memory_gb", "cache_memory_gb")  # in every line of metrics.jsonl
WEIGHTS = "adapters.safetensors"


class Finished(NamedTuple):
    """A finished run, with what it wrote to stderr."""

    config: SimPOConfig
    result: TrainResult
    text: str

    @property
    def folder(self) -> Path:
        return self.result.adapter

    @property
    def before(self) -> Evaluation:
        """The evaluation before the first step."""
        assert self.result.before is not None
        return self.result.before

    @property
    def after(self) -> Evaluation:
        """The evaluation after the last step."""
        assert self.result.after is not None
        return self.result.after


def ran(*settings: str) -> Finished:
    display, text = captured_display()
    config = load_config(None, settings)
    return Finished(config, train(config, display), text.getvalue())


@pytest.fixture(scope="module")
def finished(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run with an invalid record, evaluated after each step on the swapped training pairs: the
    better it learns, the higher that loss, so that the best step is the first."""
    folder = tmp_path_factory.mktemp("run")
    rows = some_pairs()
    swapped = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    valid = write_jsonl(folder / "valid.jsonl", swapped)
    pairs = write_jsonl(folder / "pairs.jsonl", [*rows[:5], {"prompt": "no response"}, *rows[5:]])
    more = [f"data.valid={valid}", "train.eval_every=1", f"train.steps={STEPS}"]
    more += ["data.max_quarantined=0.1", "lora.dropout=0.1"]
    return ran(*small_run(model_folder, pairs, folder / "out", *more))


def test_the_folder_has_the_documented_files(finished: Finished) -> None:
    adapter = {WEIGHTS, "adapter_config.json", "chat_template.jinja", "config.yaml"}
    record = {"metrics.jsonl", "quarantined.jsonl", "summary.json", "best", "checkpoints"}
    assert {path.name for path in finished.folder.iterdir()} == adapter | record
    assert {path.name for path in (finished.folder / "best").iterdir()} == adapter
    assert (finished.folder / "chat_template.jinja").read_text("utf-8") == CHATML


@pytest.mark.parametrize("folder", [".", "best"])
def test_the_configuration_loads_back(finished: Finished, folder: str) -> None:
    assert load_config(finished.folder / folder / "config.yaml") == finished.config


def test_metrics_has_one_line_per_step_and_evaluation(finished: Finished) -> None:
    lines = json_lines(finished.folder / "metrics.jsonl")
    kinds = [(line["step"], "eval_loss" in line) for line in lines]
    expected = [(step, later) for step in range(STEPS + 1) for later in (False, True)][1:]
    assert kinds == expected
    for line in lines:
        assert 0 < line["peak_memory_gb"] < 1
        assert line["cache_memory_gb"] >= 0
        names = set(line) - {"step", *MEMORY}
        if "eval_loss" in line:
            assert all(name.startswith("eval_") for name in names)
        else:
            assert {"loss", "rewards/margins", "learning_rate", "grad_norm", "epoch"} <= names
    before = {f"eval_{k}": v for k, v in finished.before.as_dict().items()}
    after = {f"eval_{k}": v for k, v in finished.after.as_dict().items()}
    ends = [{k: v for k, v in lines[i].items() if k not in MEMORY} for i in (0, -1)]
    assert ends[0] == {"step": 0, **json.loads(json.dumps(before))}
    assert ends[1] == {"step": STEPS, **json.loads(json.dumps(after))}
    peaks = [line["peak_memory_gb"] for line in lines]
    assert peaks == sorted(peaks)
    assert abs(peaks[-1] - finished.result.peak_memory_gb) < 1e-3
    assert lines[-2] == finished.result.last.as_dict()


def test_the_summary_is_the_result(finished: Finished) -> None:
    summary = json.loads((finished.folder / "summary.json").read_text("utf-8"))
    assert summary == json.loads(json.dumps(finished.result.as_dict()))
    assert summary["adapter"] == str(finished.folder)
    assert (summary["steps"], summary["interrupted"], summary["pairs"]) == (STEPS, False, 12)


def test_quarantined_records_are_written(finished: Finished) -> None:
    (record,) = json_lines(finished.folder / "quarantined.jsonl")
    assert record["source"] == f"{finished.config.data.train}:6"
    assert record["reason"] == "missing response"
    assert "1 record quarantined" in finished.text


def test_the_best_adapter_is_that_of_the_lowest_evaluation_loss(finished: Finished) -> None:
    lines = json_lines(finished.folder / "metrics.jsonl")
    losses = {x["step"]: x["eval_loss"] for x in lines if "eval_loss" in x and x["step"]}
    lowest = min(losses, key=losses.__getitem__)
    assert finished.result.best == lowest != STEPS
    result = evaluate(finished.config, finished.folder / "best", captured_display()[0])["adapter"]
    assert result.metrics["loss"] == pytest.approx(losses[lowest], rel=1e-5)


def test_evaluate_agrees_with_the_evaluations_of_the_run(finished: Finished) -> None:
    results = evaluate(finished.config, finished.folder, captured_display()[0])
    assert results["base"].metrics == pytest.approx(finished.before.metrics, rel=1e-5)
    assert results["adapter"].metrics == pytest.approx(finished.after.metrics, rel=1e-5)
    assert results["base"].metrics["loss"] < results["adapter"].metrics["loss"] - 0.1


def test_mlx_lm_loads_the_folder_as_it_is(finished: Finished) -> None:
    """With mlx_lm's own loader, the metrics are those of the run."""
    config = finished.config
    model, tokenizer = mlx_lm.load(config.model, adapter_path=str(finished.folder))[:2]
    assert isinstance(config.data.valid, str)
    pairs = load_pairs(config.data.valid).pairs
    encoded, _ = encode_pairs(Encoder(tokenizer, DataConfig()), pairs)
    result = evaluate_pairs(model, encoded, ObjectiveConfig())
    assert result.metrics == pytest.approx(finished.after.metrics, rel=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        ["lora.dora=true"],
        ["lora.rslora=true", "lora.lora_alpha=3"],
        ["lora.scale=7"],
        ["lora.target_modules=[q_proj, mlp.up_proj]", "lora.num_layers=1"],
        ["dtype=float16"],
        ["train.gradient_checkpointing=true", "train.compile=false"],
        ["objective.loss_type=hinge", "objective.sft_weight=0.5"],
    ],
    ids=lambda settings: settings[0],
)
def test_every_variant_is_evaluated_as_it_was_trained(
    settings: list[str], model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    more = ["train.steps=2", "train.learning_rate=5e-2", f"data.valid={pairs_file}", *settings]
    run = ran(*small_run(model_folder, pairs_file, tmp_path / "run", *more))
    results = evaluate(run.config, run.folder, captured_display()[0])
    metrics = results["adapter"].metrics
    assert metrics == pytest.approx(run.after.metrics, rel=1e-4, abs=1e-4)
    assert metrics["loss"] != pytest.approx(results["base"].metrics["loss"], abs=0.01)
    assert {a.dtype.name for a in arrays(run.folder / WEIGHTS).values()} == {"float32"}


def test_a_quantized_model(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "intermediate_size": 64}
    model = tiny_model(**sizes)
    nn.quantize(model, group_size=32, bits=4)
    config = {**tiny_config(**sizes), "quantization": {"group_size": 32, "bits": 4}}
    folder = changed_copy(model_folder, tmp_path / "model", config__json=json.dumps(config))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), {"format": "mlx"}
    )
    more = ("train.steps=2", f"data.valid={pairs_file}")
    run = ran(*small_run(folder, pairs_file, tmp_path / "run", *more))
    results = evaluate(run.config, run.folder, captured_display()[0])
    assert results["adapter"].metrics == pytest.approx(run.after.metrics, rel=1e-4)


# --- repeatability ---------------------------------------------------------------------------


def adapter_of(*settings: str) -> dict:
    return arrays(ran(*settings).folder / WEIGHTS)


def test_one_seed_gives_one_adapter_another_seed_another(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    runs = [
        adapter_of(
            *small_run(
                model_folder, pairs_file, tmp_path / name, f"seed={seed}", "lora.dropout=0.2"
            )
        )
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert_same_arrays(runs[1], runs[0])
    with pytest.raises(AssertionError):
        assert_same_arrays(runs[2], runs[0])


def test_evaluating_between_steps_does_not_change_the_adapter(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    """Neither through the weights nor through the dropout masks."""
    common = ("lora.dropout=0.3", f"data.valid={pairs_file}")
    often = small_run(model_folder, pairs_file, tmp_path / "a", *common, "train.eval_every=1")
    never = small_run(model_folder, pairs_file, tmp_path / "b", *common)
    assert_same_arrays(adapter_of(*often), adapter_of(*never))


def test_a_run_can_start_from_the_adapter_of_another(finished: Finished, tmp_path: Path) -> None:
    text = (finished.folder / "config.yaml").read_text("utf-8")
    (tmp_path / "config.yaml").write_text(text, encoding="utf-8")
    more = [f"output={tmp_path / 'run'}", f"lora.init_from={finished.folder}", "train.steps=1"]
    result = train(load_config(tmp_path / "config.yaml", more), captured_display()[0])
    assert result.before is not None
    assert result.before.metrics == pytest.approx(finished.after.metrics, rel=1e-5)


# --- without validation, into an existing folder ---------------------------------------------


def test_a_run_without_validation(model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    run = ran(*small_run(model_folder, pairs_file, tmp_path / "run", "data.valid_fraction=0"))
    assert (run.result.pairs, run.result.before, run.result.after) == (12, None, None)
    assert run.result.best is None
    assert not (run.folder / "best").exists()
    assert [x["step"] for x in json_lines(run.folder / "metrics.jsonl")] == [1, 2, 3]
    summary = json.loads((run.folder / "summary.json").read_text("utf-8"))
    assert (summary["before"], summary["after"]) == (None, None)
    assert "12 pairs to train on, 0 to evaluate on" in run.text


def test_an_empty_folder_may_be_the_output(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    run = ran(*small_run(model_folder, pairs_file, tmp_path / "run", "train.steps=1"))
    assert (run.folder / WEIGHTS).is_file()


def test_one_pair_is_enough(model_folder: Path, tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "one.jsonl", some_pairs(1))
    run = ran(*small_run(model_folder, pairs, tmp_path / "run"))
    assert (run.result.pairs, run.result.before) == (1, None)
    assert run.result.last.step == 3


def test_surprising_numbers_are_explained(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    more = ("data.max_length=44", "data.max_prompt_length=40", "train.steps=1")
    run = ran(*small_run(model_folder, pairs_file, tmp_path / "run", *more))
    for message in (
        "chat template: the tokenizer's own",
        "10 pairs to train on, 2 to evaluate on; 1 step of 4 pairs",
        "has a loss of 1.31 here, not 0.69",
        "longer than data.max_length=44",
    ):
        assert message in run.text


# --- interrupted -----------------------------------------------------------------------------


def interrupted_after(step: int) -> Any:
    """train_steps, with Ctrl-C while the step after ``step`` is being computed."""

    def steps(*arguments: Any) -> Iterator:
        for metrics in train_steps(*arguments):
            yield metrics
            if metrics.step == step:
                raise KeyboardInterrupt

    return steps


def test_ctrl_c_saves_the_last_finished_step(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_run(model_folder, pairs_file, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(session_module, "train_steps", interrupted_after(2))
        run = ran(*settings)
    assert "warning: interrupted; the adapter of step 2 is saved" in run.text
    assert (run.result.interrupted, run.result.last.step, run.result.after) == (True, 2, None)
    summary = json.loads((run.folder / "summary.json").read_text("utf-8"))
    assert (summary["interrupted"], summary["steps"], summary["after"]) == (True, 2, None)
    session = prepare(run.config, captured_display()[0])
    for step in session.steps():
        if step.step == 2:
            break
    expected = arrays(session.save(tmp_path / "stopped") / WEIGHTS)
    assert_same_arrays(arrays(run.folder / WEIGHTS), expected)


def nth_evaluation_is_interrupted(number: int) -> Any:
    calls = 0

    def pairs(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise KeyboardInterrupt
        return evaluate_pairs(*arguments)

    return pairs


def test_ctrl_c_in_an_evaluation_between_steps_saves_too(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "evaluate_pairs", nth_evaluation_is_interrupted(2))
    run = ran(*small_run(model_folder, pairs_file, tmp_path / "run", "train.eval_every=1"))
    assert (run.result.interrupted, run.result.last.step, run.result.best) == (True, 1, None)
    assert (run.folder / WEIGHTS).is_file()


def test_ctrl_c_in_the_last_evaluation_does_not_lose_the_adapter(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "evaluate_pairs", nth_evaluation_is_interrupted(2))
    run = ran(*small_run(model_folder, pairs_file, tmp_path / "run"))
    assert (run.folder / WEIGHTS).is_file()
    assert (run.result.last.step, run.result.after, run.result.interrupted) == (3, None, True)
    assert "interrupted" in run.text


def test_evaluating_between_steps_needs_validation_pairs(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    more = ("data.valid_fraction=0", "train.eval_every=1")
    with pytest.raises(SimPOError, match=r"train\.eval_every is 1, but there are no validation"):
        ran(*small_run(model_folder, pairs_file, tmp_path / "run", *more))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "engine",
    [
        ("train.engine=reference", "train.compile=true"),
        ("train.engine=reference", "train.compile=false"),
        ("train.engine=shared_prefix",),
    ],
    ids=["compiled", "eager", "shared"],
)
@pytest.mark.parametrize("checkpointing", ["true", "false"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_within_a_step_saves_the_step_before(
    error: type[BaseException],
    checkpointing: str,
    engine: tuple[str, ...],
    model_folder: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """mx.compile leaves placeholders in the model when what it traces raises."""
    more = (
        *engine,
        f"train.gradient_checkpointing={checkpointing}",
        "data.valid_fraction=0",
        "train.schedule=constant",
    )
    whole = ran(*small_run(model_folder, pairs_file, tmp_path / "whole", *more, "train.steps=2"))
    original = MLP.__call__

    def failing(self: MLP, x: mx.array) -> mx.array:
        record = tmp_path / "run" / "metrics.jsonl"
        if record.exists() and len(json_lines(record)) == 2:
            raise error
        return original(self, x)

    monkeypatch.setattr(MLP, "__call__", failing)
    # Other shapes in the third step, so that it is traced anew.
    monkeypatch.setattr("mlx_simpo.engine.plan.PAD_MULTIPLE", 1)
    run = small_run(model_folder, pairs_file, tmp_path / "run", *more)
    if error is KeyboardInterrupt:
        assert ran(*run).result.interrupted
    else:
        with pytest.raises(SimPOError, match="not enough memory"):
            ran(*run)
    saved, expected = arrays(tmp_path / "run" / WEIGHTS), arrays(whole.folder / WEIGHTS)
    for name, value in expected.items():
        np.testing.assert_allclose(saved[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    assert np.isfinite(np.array(mx.random.normal((3,)))).all()


def test_ctrl_c_before_the_first_step_leaves_nothing(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "evaluate_pairs", nth_evaluation_is_interrupted(1))
    with pytest.raises(KeyboardInterrupt):
        ran(*small_run(model_folder, pairs_file, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("eval_every", ["null", "1"])
def test_a_run_that_fails_saves_the_adapter_of_its_last_finished_step(
    eval_every: str,
    model_folder: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def steps(*arguments: Any) -> Iterator:
        yield next(train_steps(*arguments))
        raise SimPOError("the loss of step 2 is not a finite number")

    monkeypatch.setattr(session_module, "train_steps", steps)
    output = tmp_path / "run"
    with pytest.raises(SimPOError, match="step 2"):
        ran(*small_run(model_folder, pairs_file, output, f"train.eval_every={eval_every}"))
    assert arrays(output / WEIGHTS)
    assert not (output / "summary.json").exists()
    assert (output / "best" / WEIGHTS).exists() == (eval_every == "1")


# --- invalid records -------------------------------------------------------------------------


def test_exactly_the_allowed_fraction_may_be_quarantined(
    model_folder: Path, tmp_path: Path
) -> None:
    pairs = write_jsonl(tmp_path / "p.jsonl", [*some_pairs(19), {"prompt": "no response"}])
    more = ("data.valid_fraction=0.05", "data.max_quarantined=0.05", "train.steps=1")
    assert ran(*small_run(model_folder, pairs, tmp_path / "run", *more)).result.pairs == 18


def test_a_bad_pair_may_be_held_out(model_folder: Path, tmp_path: Path) -> None:
    same = "the same words again and again " * 12
    bad = {"prompt": "P?", "chosen": f"{same}x", "rejected": f"{same}y"}
    pairs = write_jsonl(tmp_path / "p.jsonl", [*some_pairs(23), bad])
    loaded = load_pairs(str(pairs)).pairs

    def held_out(seed: int) -> bool:
        return [p.index for p in split_pairs(loaded, 0.05, seed)[1]] == [23]

    seed = next(seed for seed in range(1000) if held_out(seed))
    more = ("data.valid_fraction=0.05", "data.max_length=100", "data.max_prompt_length=60")
    for number in (seed + 1, seed):  # the bad pair is trained on, and held out
        run = small_run(model_folder, pairs, tmp_path / f"run-{number}", *more, "train.steps=1")
        assert ran(*run, f"seed={number}").result.last.step == 1


# --- evaluate, generate, inspect -------------------------------------------------------------


def test_evaluate_needs_data(model_folder: Path) -> None:
    with pytest.raises(SimPOError, match=r"^data\.valid is missing"):
        evaluate(SimPOConfig(model=str(model_folder)))


def test_generate_compares_the_adapter_with_the_base(finished: Finished) -> None:
    display, text = captured_display()
    base = generate(finished.config, "Why?", max_tokens=8, display=display)
    both = generate(finished.config, "Why?", finished.folder, max_tokens=8, display=display)
    assert base.keys() == {"base"}
    assert both.keys() == {"base", "adapter"}
    assert both["base"] == base["base"]
    assert "chat template" in text.getvalue()


def test_inspect_accepts_any_number_of_invalid_records(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "x"}, *some_pairs(2), {"chosen": "a", "rejected": "b"}, [1], {"prompt": "y"}]
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    config = SimPOConfig(model=str(model_folder), data=DataConfig(max_quarantined=0.0))
    result = inspect(config, str(data), display=captured_display()[0])
    assert [pair.index for pair in result.pairs] == [1, 2]
    assert (result.summary["records"], result.summary["pairs"]) == (6, 2)
    assert result.summary["quarantined"] == {
        "missing response": 2,
        "missing prompt": 1,
        "not a JSON object": 1,
    }
    assert [q["source"].rpartition(":")[2] for q in result.summary["quarantined_records"]] == list(
        "1456"
    )
    json.dumps(result.summary, allow_nan=False)


def test_inspect_needs_one_valid_pair(model_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "x", "chosen": "a", "rejected": "a"}] * 3
    data = write_jsonl(tmp_path / "p.jsonl", rows)
    with pytest.raises(SimPOError, match="3 of 3 records are quarantined, all of them"):
        inspect(SimPOConfig(model=str(model_folder)), str(data))


def test_inspect_does_not_read_the_weights(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    folder = changed_copy(model_folder, tmp_path / "model", model__safetensors=None)
    result = inspect(SimPOConfig(model=str(folder)), str(pairs_file), display=captured_display()[0])
    expected = Encoder(tiny_tokenizer(), DataConfig())
    for pair, source in zip(result.pairs, load_pairs(str(pairs_file)).pairs, strict=True):
        assert pair.chosen.tokens.tolist() == expected.encode(source).chosen.tokens.tolist()
