"""Which template is used, where it comes from, and which records it rejects."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import BARE, CHATML, INST, assistant, system, tiny_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo import SimPOError
from mlx_simpo.data.records import Pair
from mlx_simpo.data.render import Renderer
from mlx_simpo.data.rows import InvalidRecordError

Q, A, B = user("q"), assistant("a"), assistant("b")
CONVERSATION = Pair([Q], [A], [B], 3, "pairs.jsonl:4")
STRINGS = Pair("q", "a", "b")
TOOLS = [{"type": "function", "function": {"name": "sky", "parameters": {}}}]
DEFAULT_SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"


def make_renderer(
    chat_template: str = "auto", own: str | None = CHATML, **options: Any
) -> Renderer:
    return Renderer(tiny_tokenizer(own, **options), chat_template)


def rejection(chat_template: str, messages: list[dict]) -> tuple[str, ...]:
    with pytest.raises(InvalidRecordError) as caught:
        make_renderer(chat_template).render(messages)
    return caught.value.args


def test_the_tokenizers_own_template() -> None:
    renderer = make_renderer()
    assert renderer.text == CHATML
    assert not renderer.is_plain_text
    assert renderer.origin == "the tokenizer's own"


@pytest.mark.parametrize(
    ("own", "chat_template", "why"),
    [(None, "auto", "the tokenizer has none"), (CHATML, "none", "as requested")],
)
def test_plain_text_without_a_template_or_on_request(
    own: str | None, chat_template: str, why: str
) -> None:
    renderer = make_renderer(chat_template, own)
    assert (renderer.text, renderer.is_plain_text) == (None, True)
    assert why in renderer.origin


@pytest.mark.parametrize("own", [CHATML, None])
def test_a_template_file(tmp_path: Path, own: str | None) -> None:
    file = tmp_path / "bare.jinja"
    file.write_text(BARE.replace("assistant", "ångström"), encoding="utf-8")
    renderer = make_renderer(str(file), own)
    assert (renderer.is_plain_text, renderer.origin) == (False, f"the file {file}")
    assert renderer.render([Q], generation=True) == "user: q\nångström: "


def test_a_template_file_in_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "bare.jinja").write_text(BARE)
    assert make_renderer("~/bare.jinja").text == BARE


@pytest.mark.parametrize("text", [BARE, "{{ messages[0].content }}"])
@pytest.mark.parametrize("own", [CHATML, None])
def test_the_text_of_a_template(text: str, own: str | None) -> None:
    renderer = make_renderer(text, own)
    assert (renderer.text, renderer.is_plain_text) == (text, False)
    assert renderer.render([Q, A]).startswith(("user: q\nassistant: a", "q"))


def test_an_unreadable_template_file(tmp_path: Path) -> None:
    latin = tmp_path / "latin.jinja"
    latin.write_bytes(b"\xe9{{ messages }}")
    for path in (tmp_path / "no.jinja", tmp_path, latin):
        with pytest.raises(SimPOError, match=r"data\.chat_template is .*readable") as caught:
            make_renderer(str(path))
        assert str(path) in str(caught.value)


def test_a_template_file_of_an_unknown_user() -> None:
    with pytest.raises(SimPOError, match=r"data\.chat_template"):
        make_renderer("~no-such-user-here/a.jinja")


def test_an_impossible_name_of_a_template_file() -> None:
    with pytest.raises(SimPOError, match=r"data\.chat_template"):
        make_renderer("a\0b.jinja")


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, [Q], f"{DEFAULT_SYSTEM}<|im_start|>user\nq<|im_end|>\n"),
        (
            CHATML,
            [system("s"), Q, A],
            "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n"
            "<|im_start|>assistant\na<|im_end|>\n",
        ),
        (INST, [Q, A, user("r"), B], "<s>[INST] q [/INST] a</s>[INST] r [/INST] b</s>"),
        (BARE, [Q, A, Q], "user: q\nassistant: a\nuser: q\n"),
    ],
)
def test_a_conversation_as_text(template: str, messages: list[dict], expected: str) -> None:
    assert make_renderer(own=template, bos="<s>").render(messages) == expected
    assert make_renderer(template, own=None, bos="<s>").render(messages) == expected


@pytest.mark.parametrize(
    ("template", "header"),
    [(CHATML, "<|im_start|>assistant\n"), (BARE, "assistant: "), (INST, "")],
)
def test_the_generation_prompt_is_only_added(template: str, header: str) -> None:
    renderer = make_renderer(own=template, bos="<s>")
    assert renderer.render([Q], generation=True) == renderer.render([Q]) + header


@given(st.lists(st.text(st.sampled_from("ab {}%#\n<é"), max_size=6), min_size=1, max_size=5))
@settings(deadline=None, max_examples=40)
def test_contents_are_never_executed_as_jinja(contents: list[str]) -> None:
    messages = [(user, assistant)[i % 2](text) for i, text in enumerate(contents)]
    turns = [f"{m['role']}: {m['content']}\n" for m in messages]
    assert make_renderer(BARE).render(messages) == "".join(turns)


def test_tools_reach_the_template() -> None:
    renderer = make_renderer("{{ tools[0].function.name if tools else 'no tools' }}")
    assert renderer.render([Q], TOOLS) == "sky"
    assert renderer.render([Q]) == "no tools"


def test_rendering_does_not_change_the_pair() -> None:
    prompt = [system("s"), Q]
    pair = Pair(prompt, [A], [B])
    renderer = make_renderer()
    before, chosen, _ = renderer.conversation(pair)
    renderer.render(before + chosen, generation=True)
    assert pair == Pair([system("s"), Q], [A], [B])


@pytest.mark.parametrize(
    ("template", "messages", "detail"),
    [
        (INST, [system("s"), Q, A], "only user and assistant turns"),
        ("{{ raise_exception('first\nsecond') }}", [Q], "first second"),
        ("{{ messages[3].content.text }}", [Q], "no element 3"),
        ("{{ messages[0].content + 1 }}", [Q], "str"),
        ("{% for", [Q], "end of template"),
    ],
    ids=["raise_exception", "one line", "undefined", "type", "syntax"],
)
def test_what_a_template_rejects(template: str, messages: list[dict], detail: str) -> None:
    reason, actual_detail = rejection(template, messages)
    assert reason == "rejected by the chat template"
    assert detail in actual_detail
    assert "\n" not in actual_detail


@pytest.mark.parametrize(
    "template",
    ["{% for k, v in tools|dictsort %}{% endfor %}", "{{ 1 // (messages|length - 1) }}"],
)
def test_any_error_in_a_template_rejects_the_record(template: str) -> None:
    with pytest.raises(InvalidRecordError, match="rejected by the chat template"):
        make_renderer(template).render([Q], TOOLS)


def test_strings_become_one_user_and_one_assistant_turn() -> None:
    assert make_renderer().conversation(STRINGS) == ([Q], [A], [B])


def test_messages_stay_as_they_are() -> None:
    pair = Pair([system("s"), Q, A, Q], [A], [B, Q, A])
    assert make_renderer().conversation(pair) == (pair.prompt, pair.chosen, pair.rejected)


@pytest.mark.parametrize(
    ("own", "chat_template"), [(None, "auto"), (CHATML, "none"), (None, "none")]
)
def test_a_conversation_without_a_template_is_an_error_for_the_user(
    own: str | None, chat_template: str
) -> None:
    renderer = make_renderer(chat_template, own)
    with pytest.raises(SimPOError, match=r"pairs\.jsonl:4 .*data\.chat_template") as caught:
        renderer.conversation(CONVERSATION)
    assert not isinstance(caught.value, InvalidRecordError)
    assert renderer.conversation(STRINGS) == ([Q], [A], [B])


def test_several_named_templates() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.chat_template = {"default": CHATML, "tool_use": BARE}
    renderer = Renderer(tokenizer)
    assert renderer.text is None  # there is no one text to save
    assert renderer.render([Q]) == f"{DEFAULT_SYSTEM}<|im_start|>user\nq<|im_end|>\n"
    assert renderer.render([Q], TOOLS) == "user: q\n"
