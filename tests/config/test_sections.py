"""Every setting's type and rule, and the settings that exclude each other."""

import json
import math
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
from helpers.settings import (
    SECTIONS,
    SETTINGS,
    error_of,
    in_yaml,
    kind,
    nested,
    section_with,
    write_config,
)

from mlx_simpo import (
    DataConfig,
    EarlyStoppingConfig,
    LoRAConfig,
    SimPOConfig,
    TrainConfig,
    load_config,
)

RULES = {
    # A rule's words: (values that break it, values at its edge)
    "greater than 0": ([0, -1], [1]),
    "0 or greater": ([-1], [0]),
    "0 or greater and less than 2**32": ([-1, 2**32, 2**64], [0, 2**32 - 1]),
    "at least 0 and less than 1": ([-0.1, 1, 1.5], [0, 0.999]),
    "between 0 and 1": ([-0.1, 1.1], [0, 1]),
    "at least 0 and less than 0.5": ([-0.1, 0.5, 1], [0, 0.499]),
    "2 or greater": ([1, 0, -1], []),  # 2 itself: test_the_smallest_lengths
    "-1 (all) or 1 and greater": ([0, -2], [-1, 1]),
    "not empty": ([""], ["x"]),
}


RULED = [name for name, (item, _) in SETTINGS.items() if item.metadata["rule"]]


WRONG_TYPES: dict[str, list] = {
    "int": [True, 1.0, "1", [1], {"a": 1}],
    "float": [True, "0.5", math.nan, math.inf, -math.inf, [0.5]],
    "bool": [0, 1, "true", "yes", [True]],
    "str": [0, 1.5, True, ["x"], {"a": "x"}],
    "choice": ["", "Auto", 1, True, ["cosine"]],
    "names": [0, True, [1], ["q_proj", None], {"q_proj": 1}],
    "texts": ["Why?", 0, [1], {"a": "b"}],
    "texts by name": ["a", 0, ["a"], {1: "a"}],
    "values by name": ["a", 0, ["a"], {1: "a"}],
    "sources": [0, True, [1], ["a", None], {"weight": 1}],
    "sources by name": [0, True, ["a"], {1: "a"}],
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_wrong_type_is_an_error_that_has_the_name_and_the_value(name: str) -> None:
    what, may_be_null = kind(SETTINGS[name][1])
    for value in [*WRONG_TYPES[what], *([] if may_be_null else [None])]:
        message = error_of(lambda value=value: section_with(name, value))
        assert message.startswith(f"{name} is {value!r}; it must be ")


@pytest.mark.parametrize("name", [name for name, (_, hint) in SETTINGS.items() if kind(hint)[1]])
def test_null_is_valid_where_the_type_says_so(name: str) -> None:
    assert getattr(section_with(name, None), SETTINGS[name][0].name) is None


@pytest.mark.parametrize("name", RULED)
def test_a_broken_rule_is_an_error_that_has_the_name_the_value_and_the_rule(
    name: str, tmp_path: Path
) -> None:
    item, hint = SETTINGS[name]
    rule = item.metadata["rule"].text
    assert RULES[rule][0]
    for bad in RULES[rule][0]:
        if kind(hint)[0] == "int" and isinstance(bad, float):
            continue
        what = kind(hint)[0]
        bad = {} if what.endswith("by name") and rule == "not empty" else bad
        value = float(bad) if what == "float" and isinstance(bad, int) else bad
        expected = f"{name} is {value!r}; it must be {rule}"
        file = write_config(tmp_path, in_yaml(name, bad))
        for call in (
            lambda bad=bad: section_with(name, bad),
            lambda file=file: load_config(file),
            lambda bad=bad: load_config(None, ["model=x", f"{name}={bad}"]),
        ):
            assert error_of(call) == expected


@pytest.mark.parametrize("name", RULED)
def test_a_value_at_the_edge_of_a_rule_is_valid(name: str) -> None:
    item, hint = SETTINGS[name]
    for value in RULES[item.metadata["rule"].text][1]:
        if kind(hint)[0] != "int" or isinstance(value, int):
            expected = float(value) if kind(hint)[0] == "float" else value
            by_name = kind(hint)[0] in ("texts by name", "values by name")
            expected = {"a": "x"} if by_name else expected
            assert getattr(section_with(name, expected), item.name) == expected


def test_the_smallest_lengths_are_valid() -> None:
    assert DataConfig(max_length=2, max_prompt_length=1).max_length == 2


def test_every_number_has_a_rule_and_every_setting_a_help_text() -> None:
    numbers = {n for n, (_, hint) in SETTINGS.items() if kind(hint)[0] in ("int", "float")}
    assert numbers <= set(RULED)
    assert all(item.metadata["help"] for item, _ in SETTINGS.values())


@pytest.mark.parametrize("name", ["data.train", "data.valid", "lora.init_from"])
def test_an_empty_path_is_an_error(name: str) -> None:
    assert f"{name} is ''; it must be not empty" == error_of(
        lambda: load_config(None, ["model=x", f"{name}="])
    )


@pytest.mark.parametrize("section", [SimPOConfig, *SECTIONS.values()])
def test_sections_cannot_be_changed(section: type) -> None:
    config = section(**({"model": "x"} if section is SimPOConfig else {}))
    for item in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, item.name, getattr(config, item.name))


def test_dataclasses_replace_is_checked_too() -> None:
    assert "lora.rank is 0" in error_of(lambda: replace(LoRAConfig(), rank=0))


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"max_length": 100, "max_prompt_length": 100}, "data.max_prompt_length is 100"),
        ("data", {"max_length": 100}, "less than data.max_length (100)"),
        ("data", {"max_length": 100}, "; set data.max_prompt_length=50, for example"),
        ("data", {"valid_split": "test"}, "data.valid_split is set without data.valid"),
        ("data", {"compat": "official", "chat_template": "none"}, "needs a chat template"),
        ("objective", {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing is 0.1"),
        ("lora", {"scale": 2.0, "lora_alpha": 16}, "lora.scale and lora.lora_alpha both"),
        ("lora", {"scale": 2.0, "rslora": True}, "lora.scale and lora.rslora both"),
        ("lora", {"target_modules": "q_proj"}, "it must be all-linear or a list, [q_proj]"),
        ("lora", {"target_modules": ()}, "lora.target_modules is empty"),
        (
            "lora",
            {"target_modules": ""},
            "lora.target_modules is ''; it must be all-linear or a list",
        ),
        ("train", {"epochs": 1, "steps": 10}, "train.epochs and train.steps both set the length"),
        ("train", {"compile": True}, "train.compile is true, but only the reference engine can be"),
        (
            "train.early_stopping",
            {"min_delta": 0.1},
            "train.early_stopping.min_delta is 0.1, but train.early_stopping.patience is null",
        ),
        (
            "train.early_stopping",
            {"metric": "rewards/margins"},
            "train.early_stopping.metric is 'rewards/margins', but train.early_stopping.patience "
            "is null, so that no run stops early; set patience to a number of evaluations",
        ),
    ],
)
def test_settings_that_exclude_each_other(
    section: str, values: dict, message: str, tmp_path: Path
) -> None:
    assert message in error_of(lambda: SECTIONS[section](**values))
    plain = {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
    file = write_config(tmp_path, json.dumps({"model": "x", **nested(section, plain)}))
    assert message in error_of(lambda: load_config(file))


def test_early_stopping_needs_evaluations(tmp_path: Path) -> None:
    message = "train.early_stopping.patience is 3, but there are no evaluations during training; "
    settings = {"model": "x", "train": {"early_stopping": {"patience": 3}}}
    file = write_config(tmp_path, json.dumps(settings))
    for call in (
        lambda: load_config(file),
        lambda: load_config(None, ["model=x", "train.early_stopping.patience=3"]),
        lambda: TrainConfig(early_stopping=EarlyStoppingConfig(patience=3)),
    ):
        assert error_of(call) == f"{message}set train.eval_every"
    config = load_config(
        file, ["train.eval_every=5", "train.early_stopping.metric=rewards/margins"]
    )
    expected = EarlyStoppingConfig(metric="rewards/margins", patience=3)
    assert config.train.early_stopping == expected


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("data", {"max_length": 513}),
        ("data", {"valid": "x", "valid_split": "test"}),
        ("data", {"compat": "official"}),
        ("objective", {"loss_type": "hinge"}),
        ("objective", {"label_smoothing": 0.1}),
        ("lora", {"lora_alpha": 16, "rslora": True}),
        ("lora", {"scale": 2.0}),
        ("lora", {"target_modules": ["q_proj"]}),
        ("train", {"epochs": 0.5}),
        ("train", {"compile": False}),
        ("train", {"compile": True, "engine": "reference"}),
        ("train", {"sample_prompts": ["Why?", "a, b"]}),
        ("train.early_stopping", {"patience": 1, "metric": "rewards/accuracies"}),
    ],
)
def test_settings_that_go_together(section: str, values: dict) -> None:
    config = SECTIONS[section](**values)
    for name, value in values.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(config, name) == expected


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ({}, 2.0),
        ({"rank": 64}, 2.0),
        ({"rank": 8, "lora_alpha": 32}, 4.0),
        ({"rank": 16, "lora_alpha": 1}, 0.0625),
        ({"rank": 16, "rslora": True}, 8.0),
        ({"rank": 16, "lora_alpha": 8, "rslora": True}, 2.0),
        ({"rank": 16, "scale": 20}, 20.0),
    ],
)
def test_the_scale_of_the_lora_delta(values: dict, scale: float) -> None:
    assert LoRAConfig(**values).resolved_scale == scale
