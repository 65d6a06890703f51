"""Names of other tools: what they are here, computed by hand; and the nearest of our own names."""

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.settings import error_of, nested, write_config

from mlx_simpo import SimPOConfig, SimPOError, load_config
from mlx_simpo.config.alias_rules import Here
from mlx_simpo.config.aliases import ALIASES, as_words, as_yaml, meaning
from mlx_simpo.config.hints import hint_at_name
from mlx_simpo.config.schema import all_settings, from_mapping, setting_names

NAMES = [name for name, _, _ in all_settings(SimPOConfig)]
OURS = {"dtype", "loss_type", "target_modules", "max_grad_norm", "gradient_checkpointing"}
# Their values are checked when they are used; those of no_value only say what to write.
VALUES = [True, False, "x", 0, 1, 100, -1, 2.5, None, ["x"], {"x": 1.0}, {}, []]


def here(name: str, value: Any, **others: Any) -> Here:
    result = meaning(name, value, others)
    assert result is not None
    return result


@pytest.mark.parametrize("name", ALIASES)
def test_whatever_the_value_is_the_words_name_settings_that_exist(name: str) -> None:
    for value in VALUES:
        result = here(name, value)
        assert set(result.settings) <= {*NAMES, "lora.x"}  # lora_parameters: {x: 1}
        assert result.settings or result.note, (name, value)
        assert "\n" not in as_words(result) + as_yaml(result)


def test_no_name_of_ours_is_anothers_unless_it_has_values_of_its_own() -> None:
    leaves = {name.rpartition(".")[2] for name in NAMES} - {"train"}  # mlx_lm's flag
    assert leaves & set(ALIASES) == OURS


@pytest.mark.parametrize(
    ("name", "value", "others", "settings", "is_same"),
    [
        ("simpo_gamma", 1.375, {"beta": 2.5}, {"objective.gamma_beta_ratio": 0.55}, False),
        ("gamma", 0.3, {"objective.beta": 10}, {"objective.gamma_beta_ratio": 0.03}, False),
        ("gamma", 1, {"rl_beta": 2.5, "lr": 1}, {"objective.gamma_beta_ratio": 0.4}, False),
        ("gamma", 1, {}, {"objective.gamma_beta_ratio": 0.5}, False),
        ("gamma", 1, {"beta": 0}, {"objective.gamma_beta_ratio": 0.5}, False),
        ("cpo_alpha", 0, {}, {"objective.sft_weight": 0}, True),
        ("cpo_alpha", 0.2, {}, {"objective.sft_weight": 0.2}, False),
        ("iters", 100, {}, {"train.steps": 100}, True),
        ("iters", 100, {"grad_accumulation_steps": 1}, {"train.steps": 100}, True),
        ("iters", 101, {"grad_accumulation_steps": 4}, {"train.steps": 26}, False),
        ("max_steps", -1, {}, {}, False),
        ("warmup_steps", 50, {"max_steps": 400}, {"train.warmup_ratio": 0.125}, False),
        ("warmup_steps", 50, {}, {"train.warmup_ratio": 0.1}, False),
        ("warmup_steps", 0, {}, {"train.warmup_ratio": 0}, True),
        ("warmup_steps", 0.05, {}, {"train.warmup_ratio": 0.05}, True),
        ("eval_steps", 50, {}, {"train.eval_every": 50}, True),
        ("eval_steps", 0.25, {"max_steps": 200}, {"train.eval_every": 50}, False),
        ("steps_per_eval", 200, {}, {"train.eval_every": 200}, True),
        ("save_steps", 500, {}, {"train.save_every": 500}, True),
        ("max_seq_length", 2048, {}, {"data.max_length": 2048}, False),
        (
            "cutoff_len",
            512,
            {},
            {"data.max_length": 512, "data.max_prompt_length": 256},
            False,
        ),
        ("sequence_len", 512, {"max_prompt_length": 128}, {"data.max_length": 512}, False),
        ("max_completion_length", 300, {"max_prompt_length": 100}, {"data.max_length": 400}, False),
        ("val_batches", 25, {"batch_size": 2}, {"data.valid_max": 50}, False),
        ("val_batches", -1, {}, {"data.valid_max": None}, False),
        ("val_set_size", 0.1, {}, {"data.valid_fraction": 0.1}, True),
        ("val_size", 100, {}, {"data.valid_fraction": 0.05}, False),
        ("lora_target", "all", {}, {"lora.target_modules": "all-linear"}, True),
        ("lora_target", "q_proj, v_proj", {}, {"lora.target_modules": ["q_proj", "v_proj"]}, True),
        ("lora_target_linear", True, {}, {"lora.target_modules": "all-linear"}, True),
        ("keys", ["self_attn.q_proj"], {}, {"lora.target_modules": ["self_attn.q_proj"]}, True),
        (
            "lora_parameters",
            {"rank": 8, "scale": 20.0},
            {},
            {"lora.rank": 8, "lora.scale": 20.0},
            False,
        ),
        ("lr_scheduler_type", "linear", {}, {"train.schedule": "linear"}, True),
        (
            "lr_scheduler_type",
            "constant",
            {},
            {"train.schedule": "constant", "train.warmup_ratio": 0},
            True,
        ),
        ("lr_scheduler", "constant_with_warmup", {}, {"train.schedule": "constant"}, True),
        ("lr_scheduler_type", "polynomial", {}, {"train.schedule": "cosine"}, False),
        ("use_gradient_checkpointing", "unsloth", {}, {"train.gradient_checkpointing": True}, True),
        ("max_grad_norm", 0, {}, {"train.max_grad_norm": None}, True),
        ("torch_dtype", None, {}, {"dtype": "auto"}, True),
        ("fine_tune_type", "dora", {}, {"lora.dora": True}, True),
        ("fine_tune_type", "full", {}, {}, False),
        ("adapter", "qlora", {}, {}, True),
        ("adapter", "runs/a", {}, {"lora.init_from": "runs/a"}, True),
        ("resume_adapter_file", "a/adapters.safetensors", {}, {"lora.init_from": "a"}, False),
        ("resume_adapter_file", "a", {}, {"lora.init_from": "a"}, False),
        ("dataset_mixer", {"a/b": 1.0}, {}, {"data.train": "a/b"}, False),
        ("datasets", [{"path": "a"}, {"path": "b"}], {}, {"data.train": ["a", "b"]}, False),
        (
            "dataset_test_split",
            "test",
            {"dataset_name": "a/b"},
            {"data.valid": "a/b", "data.valid_split": "test"},
            False,
        ),
        ("loss_type", "simpo", {}, {}, True),
        ("loss_type", "hinge", {}, {"objective.loss_type": "hinge"}, True),
        ("loss_type", "ipo", {}, {}, False),
        ("rl", "dpo", {}, {}, False),
        ("train", True, {}, {}, True),
        ("train", "pairs.jsonl", {}, {"data.train": "pairs.jsonl"}, True),
        ("load_in_4bit", False, {}, {}, True),
        ("load_in_4bit", True, {}, {}, False),
    ],
)
def test_what_a_setting_of_another_tool_is_here(
    name: str, value: Any, others: dict, settings: dict, is_same: bool
) -> None:
    result = here(name, value, **others)
    assert (dict(result.settings), result.is_same) == (settings, is_same)


def test_mlx_lms_data_is_a_folder_of_two_files_or_a_dataset(tmp_path: Path) -> None:
    assert dict(here("data", str(tmp_path)).settings) == {"data.train": str(tmp_path)}
    (tmp_path / "train.jsonl").touch()
    assert dict(here("data", str(tmp_path)).settings) == {"data.train": str(tmp_path)}
    (tmp_path / "valid.jsonl.gz").touch()
    assert dict(here("data", str(tmp_path)).settings) == {"data.folder": str(tmp_path)}
    assert dict(here("data", "a/b").settings) == {"data.train": "a/b"}


# Every other kind of rule would be the same in both: the authors' own files.
def test_the_names_that_users_will_try_first() -> None:
    expected = {
        "lr": "train.learning_rate",
        "alpha": "lora.lora_alpha",
        "r": "lora.rank",
        "model_name_or_path": "model",
        "output_dir": "output",
        "adapter_path": "output",
        "pref_beta": "objective.beta",
        "rl_beta": "objective.beta",
        "num_train_epochs": "train.epochs",
        "micro_batch_size": "train.batch_size",
        "early_stopping_patience": "train.early_stopping.patience",
        "random_state": "seed",
    }
    for name, ours in expected.items():
        assert here(name, 3) == Here({ours: 3}, True, here(name, 3).note)


# --- in files and in Python ------------------------------------------------------------------


def test_a_file_of_another_tool_gets_what_to_write_line_by_line(tmp_path: Path) -> None:
    file = write_config(
        tmp_path,
        "model: x\nstage: dpo\nlora_target: all\npref_beta: 2.5\nsimpo_gamma: 1.375\n"
        "output_dir: out\nbf16: true\ndata: a/b\ntrain: true\ncutoff_len: 512\n",
    )
    lines = []
    try:
        load_config(file)
    except SimPOError as error:
        lines = str(error).splitlines()
    beginnings = [re.split("; (?!under|write|leave)", line)[0] for line in lines]
    assert beginnings == [
        "unknown setting 'stage'; leave it out",
        "unknown setting 'lora_target'; under lora: write target_modules: all-linear",
        "unknown setting 'pref_beta'; under objective: write beta: 2.5",
        "unknown setting 'simpo_gamma'; under objective: write gamma_beta_ratio: 0.55",
        "unknown setting 'output_dir'; write output: out",
        "unknown setting 'bf16'; leave it out",
        "data is 'a/b'",
        "train is True",
        "unknown setting 'cutoff_len'; under data: write max_length: 512, max_prompt_length: 256",
    ]
    assert lines[6].endswith("; under data: write train: a/b")


def test_an_override_in_python_gets_the_words_of_a_command_line() -> None:
    message = error_of(lambda: load_config(None, ["model=x", "lr=1e-5"]))
    assert message == "unknown setting 'lr'; write train.learning_rate=1e-5"
    message = error_of(lambda: load_config({"model": "x", "lora": {"r": 8}}))
    assert message == "unknown setting 'lora.r'; under lora: write rank: 8"


# --- our own names ---------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["lora.rank", "lora_rank", "rank"])
def test_a_setting_outside_its_section_is_an_error_with_the_lines_that_are_right(
    written: str,
) -> None:
    message = error_of(lambda: load_config({"model": "x", written: 8}))
    assert message == f"unknown setting {written!r}; under lora: write rank: 8"


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_name_is_an_error_with_a_hint_at_the_name(name: str) -> None:
    section, _, leaf = name.rpartition(".")
    misspelt = f"{leaf[:2]}{leaf[1:]}"  # rank → raank
    path = f"{section}.{misspelt}" if section else misspelt
    with pytest.raises(SimPOError) as caught:
        from_mapping(SimPOConfig, {"model": "x", **nested(path, 1)}, SimPOConfig)
    assert str(caught.value) == f"unknown setting {path!r}; did you mean {name!r}?"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("train.rank", "lora.rank"),
        ("beta", "objective.beta"),
        ("lora.learning_rate", "train.learning_rate"),
        ("data.seed", "seed"),
        ("objective.gamma_beta", "objective.gamma_beta_ratio"),
        ("lora_rank", "lora.rank"),
        ("LORA-rank", "lora.rank"),
    ],
)
def test_a_name_in_the_wrong_section_has_a_hint_at_the_right_one(name: str, meant: str) -> None:
    assert hint_at_name(name, setting_names(SimPOConfig)) == f"; did you mean {meant!r}?"


@pytest.mark.parametrize(
    ("section", "meant"), [("trian", "train"), ("dta", "data"), ("Train", "train")]
)
def test_a_misspelt_section_has_a_hint_at_the_section(section: str, meant: str) -> None:
    with pytest.raises(SimPOError) as caught:
        from_mapping(SimPOConfig, {"model": "x", section: {"rank": 2}}, SimPOConfig)
    hint = str(caught.value).partition("; ")[2]
    assert hint.startswith((f"did you mean {meant!r}", f"did you mean '{meant}."))


def test_values_that_are_computed_with_our_defaults_follow_them() -> None:
    """A rule cannot import the settings, which import the rules: it repeats these defaults."""
    ours = load_config({"model": "x"})
    ratio = here("gamma", 3).settings["objective.gamma_beta_ratio"]
    assert ratio * ours.objective.beta == 3
    prompt = ours.data.max_prompt_length
    assert here("max_seq_length", prompt + 1).settings == {"data.max_length": prompt + 1}
    assert "data.max_prompt_length" in here("max_seq_length", prompt).settings
    assert here("max_completion_length", 9).settings == {"data.max_length": prompt + 9}
    assert here("val_batches", 7).settings == {"data.valid_max": 7 * ours.train.batch_size}
