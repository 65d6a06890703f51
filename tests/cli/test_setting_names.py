"""Names of settings: the ends that mean one of them, and those that mean none."""

import pytest
from helpers.settings import SETTINGS

from mlx_simpo.cli.setting_names import Known, is_section, is_setting, kinds, setting_named


@pytest.mark.parametrize("name", SETTINGS)
def test_the_whole_name_in_any_spelling(name: str) -> None:
    for text in (name, name.replace("_", "-"), name.replace(".", "-"), f"--{name.upper()}"):
        assert setting_named(text) == Known(name, kinds()[name])
    assert is_setting(name)


def test_an_end_of_a_name_means_a_setting_only_if_no_other_ends_so() -> None:
    for text in ("rank", "learning-rate", "early_stopping.metric", "seed"):
        known = setting_named(text)
        assert known is not None
        assert [known.name] == [
            n for n in SETTINGS if f".{n}".endswith(f".{text.replace('-', '_')}")
        ]
    ends = [name.rpartition(".")[2] for name in SETTINGS]
    for end in set(ends):
        assert (setting_named(end) is not None) == (ends.count(end) == 1 or end in SETTINGS)


@pytest.mark.parametrize(
    "text",
    ["", "--", "lora", "lora.", "rnk", "lora.rank.x", "ora.rank", "train.stpes", "data.trian"],
)
def test_other_names_mean_none(text: str) -> None:
    assert setting_named(text) is None
    assert not is_setting(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("data.columns.prompt", "data.columns.prompt"),
        ("columns.prompt", "data.columns.prompt"),
        ("template-args.enable_thinking", "data.template_args.enable_thinking"),
        ("data.train.path", "data.train.path"),
        ("data.valid.chat.split", "data.valid.chat.split"),
    ],
)
def test_parts_of_a_value_have_names(text: str, name: str) -> None:
    assert setting_named(text) == Known(name, "value")
    assert is_setting(name)


def test_how_options_are_read() -> None:
    expected = {
        "lora.dora": "flag",
        "train.compile": "flag",
        "lora.rank": "value",
        "data.columns": "value",
        "lora.target_modules": "values",
        "data.train": "values",
        "train.sample_prompts": "list",
    }
    assert {name: kinds()[name] for name in expected} == expected


def test_sections() -> None:
    assert all(map(is_section, ("data", "lora", "train.early_stopping")))
    assert not any(map(is_section, ("model", "lora.rank", "", "trian")))
