"""The section data: sources and sets with their names and defaults, and what excludes what."""

from typing import Any

import pytest
from helpers.settings import error_of

from mlx_simpo import DataConfig, SourceConfig, load_config
from mlx_simpo.config.sources import default_name


def data(**settings: Any) -> DataConfig:
    """The section with these settings, of any type."""
    return DataConfig(**settings)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pairs.jsonl", "pairs"),
        ("some/where/train.jsonl.gz", "train"),
        ("trl-lib/ultrafeedback_binarized", "ultrafeedback_binarized"),
        ("owner/name-v1.0", "name-v1"),
        ("my pairs (2).csv", "my-pairs-2"),
        ("-", "stdin"),
        ("ähm.jsonl", "hm"),
        ("日本.jsonl", "data"),
        ("/", "data"),
        (".hidden", "data"),
    ],
)
def test_a_source_is_named_after_its_path(path: str, name: str) -> None:
    assert default_name(path) == name
    assert data(train=path).train_sources()[0].name == name


@pytest.mark.parametrize("name", ["a b", "a/b", "a.b", "é", ""])
def test_names_have_letters_digits_hyphens_and_underscores(name: str) -> None:
    message = error_of(lambda: SourceConfig("a.jsonl", name=name))
    assert message == f"name is {name!r}; it must be letters, digits, - and _"
    assert error_of(lambda: data(valid={name: "a.jsonl", "other": "b.jsonl"})) == (
        f"{name!r} in data.valid is the name of a set; it must be letters, digits, - and _"
    )


def test_sources_have_the_defaults_of_the_section() -> None:
    columns = {"prompt": "question"}
    section = data(
        train=["a.jsonl", {"path": "o/b", "split": "x", "columns": {"prompt": "q"}}],
        train_split="train",
        columns=columns,
        max_samples=9,
        valid={"chat": "c.jsonl", "code": {"path": "o/d", "split": "y"}},
        valid_split="test",
    )
    a, b = section.train_sources()
    assert (a.name, a.split, a.columns, a.max_samples) == ("a", "train", columns, 9)
    assert (b.name, b.split, b.columns, b.max_samples) == ("b", "x", {"prompt": "q"}, 9)
    chat, code = section.valid_sources().values()
    assert (chat.split, chat.columns, chat.max_samples) == ("test", columns, None)
    assert (code.split, code.max_samples) == ("y", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train": [{"path": "a", "weight": 1}, "b"]},
            "only some sources of data.train have a weight; give each of them one, or none",
        ),
        (
            {"train": ["a/x.jsonl", "b/x.csv"]},
            "two sources of data.train are called 'x'; give one another name, for example "
            "{path: b/x.csv, name: x-2}",
        ),
        (
            {"valid": {"path": "a", "weight": 2}},
            "data.valid.weight is 2.0; only data.train has weights",
        ),
        (
            {"valid": {"chat": {"path": "a", "weight": 2}}},
            "data.valid.chat.weight is 2.0; only data.train has weights",
        ),
        (
            {"valid": {"chat": {"path": "a", "name": "code"}}},
            "data.valid.chat.name is 'code', but validation sets are named by their keys, "
            "data.valid: {code: …}; remove it",
        ),
        (
            {"valid": {"chat": "a"}, "valid_main": "code"},
            "data.valid_main is 'code'; it must be a name in data.valid (chat)",
        ),
        (
            {"valid": "a", "valid_main": "a"},
            "data.valid_main is 'a'; it must be a name in data.valid (which has no named sets)",
        ),
        (
            {"folder": "a", "train": "b"},
            "data.folder and data.train both name data; remove one of them",
        ),
        (
            {"folder": "a", "valid": {"chat": "b"}},
            "data.folder and data.valid both name data; remove one of them",
        ),
    ],
)
def test_what_excludes_each_other_is_told(settings: dict[str, Any], message: str) -> None:
    assert error_of(lambda: data(**settings)) == message


def test_the_split_of_a_folder_may_be_named() -> None:
    (source,) = data(folder="a", valid_split="test").valid_sources().values()
    assert (source.path, source.split) == ("a", "test")


def test_a_sources_own_settings_win() -> None:
    section = data(
        train=["a.jsonl", {"path": "b.jsonl", "max_samples": 20}, {"path": "c", "max_samples": 3}],
        valid={"chat": {"path": "d.jsonl", "max_samples": 2, "columns": {"prompt": "q"}}},
        max_samples=9,
        columns={"prompt": "question"},
    )
    assert [source.max_samples for source in section.train_sources()] == [9, 20, 3]
    chat = section.valid_sources()["chat"]
    assert (chat.max_samples, chat.columns) == (2, {"prompt": "q"})


@pytest.mark.parametrize("weights", [(1, None), (None, 1), (1, 2, None)])
def test_all_sources_have_weights_or_none_has(weights: tuple[int | None, ...]) -> None:
    train = [{"path": f"{n}.jsonl", "weight": weight} for n, weight in enumerate(weights)]
    assert error_of(lambda: data(train=train)) == (
        "only some sources of data.train have a weight; give each of them one, or none"
    )


@pytest.mark.parametrize("weight", [0, -1.0])
def test_a_weight_is_greater_than_0(weight: float) -> None:
    message = error_of(lambda: data(train=[{"path": "a.jsonl", "weight": weight}]))
    assert message == f"data.train[0].weight is {float(weight)}; it must be greater than 0"


def test_a_set_in_braces_on_the_command_line() -> None:
    setting = "data.valid.chat={path: a.jsonl, max_samples: 3}"
    config = load_config(None, ["model=m", "data.train=t", setting, "data.valid.code=b.jsonl"])
    chat, code = config.data.valid_sources().values()
    assert (chat.path, chat.max_samples) == ("a.jsonl", 3)
    assert (code.path, code.max_samples) == ("b.jsonl", None)
