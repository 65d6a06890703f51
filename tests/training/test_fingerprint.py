"""What may differ when a run is resumed, setting by setting, and what the messages say."""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from helpers.commands import captured_display, small_run
from helpers.settings import SETTINGS
from helpers.tiny import some_pairs, tiny_folder, token_pair, write_jsonl

from mlx_simpo import SimPOConfig, SimPOError, load_config, prepare
from mlx_simpo.data.encode import TokenizedSequence
from mlx_simpo.data.tokens import content_sha256
from mlx_simpo.training import fingerprint as fingerprint_module
from mlx_simpo.training.fingerprint import check_same_run, fingerprint

# What decides the gradients, the order of the data or the updates.
SAME = {
    "dtype",
    "seed",
    "data.valid_main",
    "data.valid_fraction",
    "data.max_length",
    "data.max_prompt_length",
    "data.template_args",
    "data.score",
    "data.compat",
    "data.implicit_string_prompts",
    "objective.beta",
    "objective.gamma_beta_ratio",
    "objective.loss_type",
    "objective.label_smoothing",
    "objective.sft_weight",
    "lora.rank",
    "lora.lora_alpha",
    "lora.scale",
    "lora.dropout",
    "lora.rslora",
    "lora.dora",
    "lora.target_modules",
    "lora.num_layers",
    "train.learning_rate",
    "train.schedule",
    "train.warmup_ratio",
    "train.weight_decay",
    "train.adam_beta1",
    "train.adam_beta2",
    "train.adam_epsilon",
    "train.max_grad_norm",
    "train.early_stopping.metric",
}
ROUNDING = {
    "train.engine",
    "train.batch_size",
    "train.max_tokens_per_step",
    "train.gradient_accumulation_steps",
    "train.gradient_checkpointing",
    "train.compile",
    "logps.impl",
    "engine.attention",
    "engine.calibration",
}


def run_of(changes: Mapping[str, Any] = MappingProxyType({})) -> dict[str, Any]:
    """The fingerprint of a run, as it is read from a checkpoint."""
    content = {
        "config": SimPOConfig(model="model").as_dict(),
        "training pairs": "a",
        "validation pairs": "b",
        "model": {"quantization": None, "content": "c"},
        "chat template": "d",
        "versions": {"mlx": "0.32.0", "mlx-lm": "0.32.2", "mlx-simpo": "1.0"},
    }
    return json.loads(json.dumps(content | dict(changes)))


def with_setting(name: str, value: Any) -> dict[str, Any]:
    """The fingerprint of a run with this one setting, which need not be valid."""
    run = run_of()
    section = run["config"]
    *sections, leaf = name.split(".")
    for part in sections:
        section = section[part]
    section[leaf] = value
    return run


def test_every_setting_has_the_rule_that_is_meant() -> None:
    """A new setting must be added here if it is not free."""
    rules = {name: item.metadata["on_resume"] for name, (item, _) in SETTINGS.items()}
    assert {name for name, rule in rules.items() if rule == "same"} == SAME
    assert {name for name, rule in rules.items() if rule == "rounding"} == ROUNDING


def test_the_same_run_goes_on_without_a_word() -> None:
    assert check_same_run(run_of(), run_of()) == []


@pytest.mark.parametrize("name", sorted(SAME))
def test_a_setting_that_decides_the_result_must_not_change(name: str) -> None:
    with pytest.raises(SimPOError) as error:
        check_same_run(with_setting(name, "then"), with_setting(name, "now"))
    assert str(error.value) == (
        f"this run cannot go on with other settings or data: {name} was 'then' and is 'now'. Undo "
        "these changes, or begin a new run in another output folder; docs/long_runs.md lists what "
        "may change"
    )


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - SAME - ROUNDING))
def test_a_free_setting_may_change_without_a_warning(name: str) -> None:
    messages = check_same_run(with_setting(name, 1), with_setting(name, 2))
    schedule = "the number of steps changed: the learning rate follows the schedule of the new"
    assert [message[: len(schedule)] for message in messages] == (
        [schedule] if name in ("train.steps", "train.epochs") else []
    )


def test_settings_that_change_the_rounding_are_named() -> None:
    now = run_of()
    now["config"]["train"] |= {"batch_size": 2, "gradient_accumulation_steps": 8}
    now["config"]["logps"]["impl"] = "mlx"
    assert check_same_run(run_of(), now) == [
        "train.batch_size, train.gradient_accumulation_steps, logps.impl changed: the run goes on, "
        "but not bit for bit as it would have"
    ]


def test_the_number_of_pairs_per_step_must_stay() -> None:
    now = with_setting("train.batch_size", 8)
    message = r"train\.batch_size × train\.gradient_accumulation_steps was 16 and is 32\. Undo"
    with pytest.raises(SimPOError, match=message):
        check_same_run(run_of(), now)


@pytest.mark.parametrize("name", ["training pairs", "validation pairs", "model", "chat template"])
def test_other_content_is_named(name: str) -> None:
    with pytest.raises(SimPOError, match=f"settings or data: the {name} changed. Undo"):
        check_same_run(run_of(), run_of({name: "other"}))


def test_all_differences_are_in_one_message() -> None:
    then, now = with_setting("seed", 1), with_setting("seed", 2)
    now["config"]["lora"]["rank"] = 99
    now["model"] = {}
    with pytest.raises(SimPOError) as error:
        check_same_run(then, now)
    assert "seed was 1 and is 2; lora.rank was 16 and is 99; the model changed." in str(error.value)


def test_other_versions_are_a_warning() -> None:
    now = run_of({"versions": {"mlx": "0.33.0", "mlx-lm": "0.32.2", "mlx-simpo": "2.0"}})
    assert check_same_run(run_of(), now) == [
        "mlx was 0.32.0 and is 0.33.0; mlx-simpo was 1.0 and is 2.0: the run goes on, but not bit "
        "for bit as it would have"
    ]


def test_a_setting_that_the_older_version_did_not_have_is_not_compared() -> None:
    then = copy.deepcopy(run_of())
    del then["config"]["lora"]["rslora"], then["config"]["train"]["engine"]
    del then["config"]["train"]["early_stopping"]
    assert check_same_run(then, run_of()) == []


# --- of a session ----------------------------------------------------------------------------


@pytest.fixture
def new_fingerprint(
    model_folder: Path, pairs_file: Path, tmp_path: Path
) -> Callable[..., dict[str, Any]]:
    """A function that returns the fingerprint of a run with these settings."""

    def create(*settings: str) -> dict[str, Any]:
        run = small_run(model_folder, pairs_file, tmp_path / "run", *settings)
        session = prepare(load_config(None, run), captured_display()[0])
        return json.loads(json.dumps(fingerprint(session)))

    return create


def test_content_counts_and_names_do_not(
    new_fingerprint: Callable[..., dict[str, Any]], model_folder: Path, tmp_path: Path
) -> None:
    first = new_fingerprint()
    data = write_jsonl(tmp_path / "other.jsonl", some_pairs())
    model = tiny_folder(tmp_path / "other")
    template = tmp_path / "template.jinja"
    template.write_text((model / "chat_template.jinja").read_text("utf-8"), encoding="utf-8")
    same = new_fingerprint(f"data.train={data}", f"model={model}", f"data.chat_template={template}")
    assert check_same_run(first, same) == []

    def problems(*settings: str) -> str:
        with pytest.raises(SimPOError) as error:
            check_same_run(first, new_fingerprint(*settings))
        return str(error.value).partition("data: ")[2].partition(". Undo")[0]

    assert problems(f"model={tiny_folder(tmp_path / 'more', seed=1)}") == "the model changed"
    write_jsonl(data, some_pairs(13))
    assert "the training pairs changed" in problems(f"data.train={data}")
    template.write_text(template.read_text("utf-8").replace("Be kind.", "Be good."))
    message = problems(f"data.chat_template={template}")
    assert "the chat template changed" in message
    assert "the training pairs changed" in message


def test_a_package_of_another_version_is_noticed(
    new_fingerprint: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = new_fingerprint()
    monkeypatch.setattr(fingerprint_module, "version", lambda name: f"9.{len(name)}")
    (message,) = check_same_run(first, new_fingerprint())
    assert "mlx was " in message
    assert " and is 9.3; mlx-lm was " in message


def test_the_hash_of_pairs_sees_every_token_and_the_order_and_not_where_they_are_from() -> None:
    pairs = [token_pair(4, 3, 5, seed) for seed in (1, 2)]
    moved = [replace(p, source="elsewhere:9", index=77) for p in pairs]
    assert content_sha256(moved) == content_sha256(pairs)
    assert content_sha256(pairs[::-1]) != content_sha256(pairs)
    other = TokenizedSequence(pairs[1].rejected.tokens, 5)
    assert content_sha256([pairs[0], replace(pairs[1], rejected=other)]) != content_sha256(pairs)
    tokens = np.array(pairs[0].chosen.tokens)
    tokens[-1] += 1
    changed = replace(pairs[0], chosen=TokenizedSequence(tokens, pairs[0].chosen.score_start))
    assert content_sha256([changed, pairs[1]]) != content_sha256(pairs)
