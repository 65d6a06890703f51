"""Hints at the right name: for slips, for other sections, and for other libraries' names."""

import pytest
from helpers.settings import nested

from mlx_simpo import SimPOConfig, SimPOError
from mlx_simpo.config.aliases import ALIASES
from mlx_simpo.config.schema import all_settings, from_mapping, nearest_name

NAMES = [name for name, _, _ in all_settings(SimPOConfig)]


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
    ],
)
def test_a_name_in_the_wrong_section_has_a_hint_at_the_right_one(name: str, meant: str) -> None:
    assert nearest_name(name, SimPOConfig) == f"; did you mean {meant!r}?"


@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("section", ["", "train.", "lora."])
def test_names_of_other_libraries_have_hints_at_ours(alias: str, section: str) -> None:
    assert ALIASES[alias].split()[0] in NAMES
    assert ALIASES[alias] in nearest_name(section + alias, SimPOConfig)


def test_the_names_that_users_will_try_first_have_hints() -> None:
    expected = {
        "gamma": "objective.gamma_beta_ratio",
        "lr": "train.learning_rate",
        "alpha": "lora.lora_alpha",
        "r": "lora.rank",
        "iters": "train.steps",
        "max_seq_length": "data.max_length",
    }
    assert {name: ALIASES[name].split()[0] for name in expected} == expected


@pytest.mark.parametrize(
    ("section", "meant"), [("trian", "train"), ("dta", "data"), ("Train", "train")]
)
def test_a_misspelt_section_has_a_hint_at_the_section(section: str, meant: str) -> None:
    with pytest.raises(SimPOError) as caught:
        from_mapping(SimPOConfig, {"model": "x", section: {"rank": 2}}, SimPOConfig)
    hint = str(caught.value).partition("; ")[2]
    assert hint.startswith((f"did you mean {meant!r}", f"did you mean '{meant}."))
