"""Strict settings: which values are valid, and the messages for those that are not."""

import math
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, ClassVar, Literal, Optional

import pytest

from mlx_simpo import SimPOError
from mlx_simpo.config.schema import (
    FRACTION,
    NON_EMPTY,
    NON_NEGATIVE,
    POSITIVE,
    SHARE,
    RawText,
    Rule,
    Section,
    all_settings,
    coerce,
    from_mapping,
    setting,
)
from mlx_simpo.errors import InvalidSettingsError

Letter = Literal["a", "1"]
Names = str | tuple[str, ...]


@dataclass(frozen=True)
class Item(Section):
    """A section that its required setting can stand for."""

    title: str = setting(help="title", rule=NON_EMPTY)
    size: int = setting(1, "size", POSITIVE)


Items = str | Item | tuple[Item, ...]
NamedItems = str | Item | dict[str, Item]
Texts = dict[str, str]
Anything = dict[str, Any]


@dataclass(frozen=True)
class Deep(Section):
    """A section within a section."""

    NAME: ClassVar[str] = "inner.deep"

    depth: int = setting(1, "a depth", POSITIVE)


@dataclass(frozen=True)
class Inner(Section):
    """A section."""

    NAME: ClassVar[str] = "inner"

    deep: Deep = Deep()
    share: float | None = setting(None, "a share", SHARE)
    words: str | tuple[str, ...] = setting("all", "some words")


@dataclass(frozen=True)
class Outer(Section):
    """A configuration with one required setting."""

    count: int = setting(help="number of items", rule=POSITIVE)
    inner: Inner = Inner()


def read(mapping: dict) -> Outer:
    return from_mapping(Outer, mapping, Outer)


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, 3, 3),
        (int, -3, -3),
        (float, 3, 3.0),
        (float, 2.5, 2.5),
        (bool, False, False),
        (str, "", ""),
        (str, "3", "3"),
        (int | None, None, None),
        (Optional[int], 4, 4),  # noqa: UP045
        (float | None, 0, 0.0),
        (Letter, "1", "1"),
        (Letter | None, None, None),
        (Names, ["q", "k"], ("q", "k")),
        (Names, ("q",), ("q",)),
        (Names, "all", "all"),
        (Texts, {"a": "b"}, {"a": "b"}),
        (Texts | None, None, None),
        (Anything, {"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}),
        (Items, "a", "a"),
        (Items, ["a", {"title": "b", "size": 2}, Item("c")], (Item("a"), Item("b", 2), Item("c"))),
        (Items, {"title": "a"}, Item("a")),
        (NamedItems, {"title": "a"}, Item("a")),
        (NamedItems, {"a": "b", "c": {"title": "d"}}, {"a": Item("b"), "c": Item("d")}),
    ],
)
def test_values_of_the_right_type_are_valid(hint: Any, value: Any, expected: Any) -> None:
    result = coerce(value, hint, "here")
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value", "types"),
    [
        (int, True, "a whole number"),
        (int, 3.0, "a whole number"),
        (int, "3", "a whole number"),
        (int, None, "a whole number"),
        (int | None, "null", "a whole number or null"),
        (float, True, "a finite number"),
        (float, "1.0", "a finite number"),
        (float, math.nan, "a finite number"),
        (float, math.inf, "a finite number"),
        (float | None, -math.inf, "a finite number or null"),
        (float, [1.0], "a finite number"),
        (bool, 1, "true or false"),
        (bool, "true", "true or false"),
        (bool, None, "true or false"),
        (str, 3, "text"),
        (str, True, "text"),
        (str, None, "text"),
        (str, ["a"], "text"),
        (str | None, 0, "text or null"),
        (Letter, "b", "one of 'a', '1'"),
        (Letter, 1, "one of 'a', '1'"),
        (Letter, ["a"], "one of 'a', '1'"),
        (Letter | None, "b", "one of 'a', '1' or null"),
        (Names, [1], "text or a list of texts"),
        (Names, ["a", None], "text or a list of texts"),
        (Names, {"a": 1}, "text or a list of texts"),
        (Texts, "a", "names with their values ({name: value})"),
        (Texts, {1: "a"}, "names with their values ({name: value})"),
        (
            Items,
            [1],
            "text or settings with their values ({title: …}) or a list of settings with their "
            "values ({title: …})",
        ),
        (Item, {"size": 1}, "settings with their values ({title: …})"),
    ],
)
def test_values_of_another_type_are_errors(hint: Any, value: Any, types: str) -> None:
    with pytest.raises(SimPOError) as caught:
        coerce(value, hint, "the.name")
    assert str(caught.value) == f"the.name is {value!r}; it must be {types}"


@pytest.mark.parametrize("value", [10**400, RawText("1" + "0" * 400)], ids=["python", "raw"])
def test_an_integer_larger_than_any_float_is_an_error(value: Any) -> None:
    with pytest.raises(SimPOError, match="finite number"):
        coerce(value, float, "here")


@pytest.mark.parametrize(
    ("hint", "text", "expected"),
    [
        (int, "12", 12),
        (int, "1_000", 1000),
        (float, "1e-6", 1e-6),
        (float, "3", 3.0),
        (float, "-.5", -0.5),
        (bool, "false", False),
        (int | None, "null", None),
        (float | None, "2e0", 2.0),
        (str, "12", "12"),
        (str, "1e-6", "1e-6"),
        (str, "null", "null"),
        (str, "yes: [no", "yes: [no"),
        (str | None, "null", None),
        (str | None, "true", "true"),
        (Letter, "1", "1"),
        (Letter | None, "null", None),
        (Names, "[q, k]", ("q", "k")),
        (Names, "[yes, no]", ("yes", "no")),
        (Names, "all", "all"),
        (Names, "null", "null"),
        (Texts, "{a: b, c: yes}", {"a": "b", "c": "yes"}),
        (Anything, "{a: [1, {b: null}], c: false}", {"a": [1, {"b": None}], "c": False}),
        (Items, "a", "a"),
        (Items, "1e5", "1e5"),
        (Items, "[a, {title: b, size: 2}]", (Item("a"), Item("b", 2))),
        (Items, "{title: b}", Item("b")),
        (Items | None, "null", None),
        (NamedItems, "{a: b, c: {title: d}}", {"a": Item("b"), "c": Item("d")}),
    ],
)
def test_command_line_text_is_parsed_by_the_type_of_its_setting(
    hint: Any, text: str, expected: Any
) -> None:
    result = coerce(RawText(text), hint, "here")
    assert result == expected
    assert type(result) is type(expected)  # and not RawText


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "three"),
        (int, "1e3"),
        (int, '"3"'),
        (int, "null"),
        (int, ""),
        (int, "08"),
        (float, ".nan"),
        (float, ".inf"),
        (float, "1e999"),
        (float, "nan"),
        (float, "1,5"),
        (bool, "yes"),
        (bool, "True"),
        (bool, "1"),
        (Letter, "null"),
        (Letter, ""),
        (Names, "[q, 1]"),
        (Names, "{q: k}"),
        (Names, "[q"),
        (int, "!!python/object/apply:os.getpid []"),
    ],
)
def test_command_line_text_of_another_type_is_an_error(hint: Any, text: str) -> None:
    with pytest.raises(SimPOError, match=r"^here "):
        coerce(RawText(text), hint, "here")


@pytest.mark.parametrize(
    ("rule", "inside", "outside"),
    [
        (POSITIVE, [1, 5e-324], [0, -1, -5e-324]),
        (NON_NEGATIVE, [0, 1], [-1, -5e-324]),
        (FRACTION, [0, 1 - 1e-16], [1, -5e-324]),
        (SHARE, [0, 1], [1 + 1e-15, -5e-324]),
        (NON_EMPTY, ["a", " "], [""]),
    ],
)
def test_rules_hold_up_to_their_edges(rule: Rule, inside: list, outside: list) -> None:
    assert all(rule.holds(value) for value in inside)
    assert not any(rule.holds(value) for value in outside)


def test_a_whole_mapping_is_read() -> None:
    inner = {"share": 1, "words": ["a", "b"], "deep": {"depth": 4}}
    config = read({"count": 2, "inner": inner})
    assert config == Outer(2, Inner(Deep(4), share=1.0, words=("a", "b")))
    assert type(config.inner.share) is float


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({}, "count is missing; set it to the number of items"),
        ({"count": 0}, "count is 0; it must be greater than 0"),
        ({"count": 1, "inner": 5}, "inner is 5; it must be a section of settings (inner: …)"),
        ({"count": 1, "inner": [1]}, "inner is [1]; it must be a section of settings (inner: …)"),
        ({"count": 1, "inner": {"share": 1.5}}, "inner.share is 1.5; it must be between 0 and 1"),
        ({"count": 1, "inner": {"shar": 1}}, "unknown setting 'inner.shar'; did you mean 'inner."),
        ({"count": 1, "share": 1}, "unknown setting 'share'; under inner: write share: 1"),
        ({"count": 1, 5: 6}, "unknown setting '5'; `mlx-simpo train --help` lists them all"),
        ({"count": 1, "inner": {None: 6}}, "unknown setting 'inner.None'"),
        (
            {"count": 1, "inner": {"deep": {"depth": 0}}},
            "inner.deep.depth is 0; it must be greater than 0",
        ),
        (
            {"count": 1, "inner": {"deep": 3}},
            "inner.deep is 3; it must be a section of settings (inner.deep: …)",
        ),
        (
            {"count": 1, "inner": {"deap": {"depth": 2}}},
            "unknown setting 'inner.deap'; did you mean 'inner.deep'?",
        ),
        (
            {"count": 1, "inner": {"deep": {"dept": 2}}},
            "unknown setting 'inner.deep.dept'; did you mean 'inner.deep.depth'?",
        ),
    ],
)
def test_an_invalid_mapping_is_an_error(mapping: dict, message: str) -> None:
    with pytest.raises(SimPOError) as caught:
        read(mapping)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("hint", "value", "messages"),
    [
        (Texts, {"a": 1, "b": "c", "d": None}, ["a is 1; it must be text", "d is None; it must"]),
        (
            Items,
            ["a", {"titel": "b"}, {"title": ""}],
            [
                "[1].titel'; did you mean 'the.name[1].title'?",
                "[1].title is missing; set it to the title",
                "[2].title is ''; it must be not empty",
            ],
        ),
        (
            NamedItems,
            {"a": {"title": "b", "size": 0}, "c": 5},
            [
                "a.size is 0; it must be greater than 0",
                "c is 5; it must be settings with their values ({title: …})",
            ],
        ),
    ],
)
def test_all_mistakes_within_a_value_are_told_with_their_positions(
    hint: Any, value: Any, messages: list[str]
) -> None:
    with pytest.raises(InvalidSettingsError) as caught:
        coerce(value, hint, "the.name")
    assert len(caught.value.messages) == len(messages)
    for actual, expected in zip(caught.value.messages, messages, strict=True):
        assert "the.name" in actual
        assert expected in actual


def test_all_mistakes_of_a_mapping_are_told() -> None:
    inner = {"shar": 1, "words": 3, "deep": {"depth": 0}, "share": 2}
    with pytest.raises(InvalidSettingsError) as caught:
        read({"cuont": 3, "inner": inner})
    assert caught.value.messages == (
        "unknown setting 'cuont'; did you mean 'count'?",
        "unknown setting 'inner.shar'; did you mean 'inner.share'?",
        "inner.words is 3; it must be text or a list of texts",
        "inner.deep.depth is 0; it must be greater than 0",
        "inner.share is 2.0; it must be between 0 and 1",
        "count is missing; set it to the number of items",
    )


def test_a_rule_does_not_apply_to_null() -> None:
    assert Inner(share=None).share is None


def test_sections_are_frozen() -> None:
    section = Inner()
    with pytest.raises(FrozenInstanceError):
        section.share = 0.5  # type: ignore[misc]


def test_all_settings_are_listed_in_order_with_dots() -> None:
    names = ["count", "inner.deep.depth", "inner.share", "inner.words"]
    assert [name for name, _, _ in all_settings(Outer)] == names
