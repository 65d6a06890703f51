"""Messages of errors: on one line, and without tokens and passwords."""

import pytest

from mlx_simpo import SimPOError
from mlx_simpo.errors import has_secret, one_line, redacted, visible

TOKEN = "hf_plantedSecretToken0123456789"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"the Hub does not know {TOKEN}.", "the Hub does not know …."),
        ("hf_oauth_eyJhbGciOi.JIUz-I1_NiJ9 expired", "… expired"),
        (f"Illegal header value b'Bearer {TOKEN}'", "Illegal header value b'…'"),
        ("Authorization: Bearer abc.def", "Authorization: …"),
        ("'https://ann:pass1234@example.org/x.jsonl'", "'https://…@example.org/x.jsonl'"),
        ("git+https://abc123@github.com/a/b", "git+https://…@github.com/a/b"),
    ],
)
def test_tokens_and_passwords_are_replaced(text: str, expected: str) -> None:
    assert redacted(text) == expected
    assert str(SimPOError(text)) == expected
    assert has_secret(text) == ("Authorization" not in text)


@pytest.mark.parametrize(
    "text",
    [
        "hf-internal-testing/tiny-random-LlamaForCausalLM",
        "models/hf_llama/model.safetensors",
        "https://huggingface.co/datasets/ann/pairs",
        "{% set mail = 'ann@example.org' %}",
        "s3://bucket/key@version",
    ],
)
def test_ordinary_text_stays(text: str) -> None:
    assert redacted(text) == text
    assert not has_secret(text)


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_the_users_own_token_is_replaced_whatever_its_form(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, " corp-Secret-42\n")
    assert str(SimPOError("sent corp-Secret-42 twice: corp-Secret-42")) == "sent … twice: …"
    monkeypatch.setenv(variable, "a")
    assert redacted("a cat") == "a cat"


def test_an_error_of_several_lines_becomes_one() -> None:
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("abcdef", 4) == "abc…"


def test_a_terminal_gets_nothing_to_act_on() -> None:
    assert visible("a\x1b[2J\x07\r\x9b1m\x7f\ud83d") == "a\\x1b[2J\\x07\\r\\x9b1m\\x7f\\ud83d"
    text = "Zeile\n\tümlaut 👩\u200d🔬 \u0645\u06cc\u200c\u062e"
    assert visible(text) == text
