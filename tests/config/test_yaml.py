"""YAML without its traps: numbers, text, repeated keys, and text that reads back."""

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_simpo import SimPOConfig, SimPOError, load_config
from mlx_simpo.config.schema import all_settings
from mlx_simpo.config.yaml import dump_inline, dump_yaml, key_lines, parse_yaml

NAMES = [name for name, _, _ in all_settings(SimPOConfig)]


def error_of(overrides: list[str]) -> str | None:
    """The message of the error that these settings are, if they are one."""
    try:
        load_config(None, overrides)
    except SimPOError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        ("+5e-5", 5e-5),
        ("-2.5e-3", -2.5e-3),
        ("1.", 1.0),
        (".5", 0.5),
        ("1.e2", 100.0),
        ("0.0", 0.0),
        ("12", 12),
        ("-1", -1),
        ("true", True),
        ("false", False),
        ("null", None),
        ("", None),
        ("~", None),
    ],
)
def test_yaml_scalars_that_are_not_text(text: str, value: Any) -> None:
    parsed = parse_yaml(f"key: {text}", "x")["key"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(
    "text",
    [
        *("yes", "no", "on", "off", "Yes", "True", "FALSE", "y", ".inf", ".nan", "1e", "e5"),
        *("1.2.3", "010", "0x1f", "0b1", "0x_", "1:30", "2024-13-45", "2026-01-01"),
    ],
)
def test_yaml_scalars_that_stay_text(text: str) -> None:
    assert parse_yaml(f"key: {text}", "x") == {"key": text}


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("a: 1\na: 2", "a", 2),
        ("a: {b: 1, b: 1}", "b", 1),
        ("a:\n  b: 1\n  c: 2\n  b: 3", "b", 4),
        ("a:\n  - {c: 1}\n  - {d: 1, d: 2}", "d", 3),
        ("1: a\n1: b", "1", 2),
    ],
)
def test_a_repeated_key_is_an_error(text: str, key: str, line: int) -> None:
    with pytest.raises(SimPOError) as error:
        parse_yaml(text, "the file")
    quoted = key if key.isdigit() else repr(key)
    assert str(error.value) == f"the file is not valid YAML: {quoted} appears twice (line {line})"


@pytest.mark.parametrize(
    "text", ["a: [", "a: b: c", "\ta: 1", "a: 'b", "a\x00", "a: *b", "--- 1\n--- 2", "a: !x 1", "%"]
)
def test_invalid_yaml_is_an_error_of_one_line_that_names_the_file(text: str) -> None:
    with pytest.raises(SimPOError, match=r"^the file is not valid YAML: .") as caught:
        parse_yaml(text, "the file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: &x [1]\nb: *x", "&x [*x]", "a: &x {b: 1}\nc: {<<: *x}"])
def test_an_alias_is_an_error(text: str) -> None:
    """Ten lists of ten aliases each, one after the other, would be a list of 10 billion values."""
    with pytest.raises(
        SimPOError, match=r"valid YAML: \*x is an alias; write its value again \(line"
    ):
        parse_yaml(text, "the file")


def test_a_value_that_appears_twice_is_written_twice() -> None:
    names = ["q_proj"]
    text = dump_yaml({"a": names, "b": names})
    assert parse_yaml(text, "x") == {"a": names, "b": names}
    assert "&" not in text


BROKEN = ["[a]: b", "? {a: 1}\n: b", "a: 1" + "0" * 5000, "[" * 5000]


@pytest.mark.parametrize("text", BROKEN, ids=lambda text: text[:12])
def test_yaml_that_cannot_be_constructed_is_an_error(text: str) -> None:
    with pytest.raises(SimPOError, match=r"^the file is not valid YAML: ."):
        parse_yaml(text, "the file")


@given(
    name=st.sampled_from(NAMES),
    text=st.text("ab01e.-+_:,'\"#[]{}&*!?|>%@~x \n", max_size=12),
)
@example(name="train.steps", text="2024-13-45")
@example(name="lora.target_modules", text="{[a]: b}")
@settings(deadline=None, max_examples=50, derandomize=True)
def test_any_text_for_a_setting_is_a_value_or_an_error_that_names_it(name: str, text: str) -> None:
    message = error_of(["model=x", f"{name}={text}"])
    assert message is None or name in message


def test_the_line_of_every_key() -> None:
    text = (
        "# comment\na: 1\n\nb:\n  c: {d: 2,\n    e: 3}\n  'f': |\n    text\n    g: 4\nh: [{i: 5}]\n"
    )
    lines = {"a": 2, "b": 4, "b.c": 5, "b.c.d": 5, "b.c.e": 6, "b.f": 7, "h": 10}
    assert key_lines(text) == lines
    assert key_lines("") == {}
    assert key_lines("- a: 1") == {}


@given(
    st.text(
        st.sampled_from("019eE+-._:x \t\n\r\x85\u2028~#'\"{}[]é😀") | st.characters(codec="utf-8")
    )
)
@example("1e5")
@example("null")
@settings(deadline=None, max_examples=200, derandomize=True)
def test_every_text_reads_back(text: str) -> None:
    assert parse_yaml(dump_yaml({"key": text}), "x") == {"key": text}
    inline = dump_inline([text, {text: [text]}])
    assert len(inline.splitlines()) == 1
    assert parse_yaml(inline, "x") == [text, {text: [text]}]
    assert parse_yaml(dump_inline(text), "x") == text
