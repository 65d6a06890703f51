"""What a template drops is noticed, and nothing is that it writes in its own way."""

from typing import Any

import pytest
from helpers.chat_templates import TEMPLATES, template_tokenizer
from helpers.tiny import INST, assistant, system, tiny_tokenizer, user

from mlx_simpo import DataConfig
from mlx_simpo.data.dropped import Dropped, dropped_parts, special_parts
from mlx_simpo.data.encode import Encoder
from mlx_simpo.data.records import InvalidRecordError, Message, Pair
from mlx_simpo.data.render import Renderer

Q, A = user("Why?"), assistant("Because.")
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"place": "here"}}}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "sky", "description": "d", "parameters": {"properties": {"place": 1}}},
    }
]
WITH_CALL = assistant("Let me look.", tool_calls=[CALL])
THINKING = assistant("Because.", reasoning_content="Let me see.")


def dropped(template: str, *messages: Message, tools: list | None = None) -> Dropped:
    """What a template, known by its name or as text, drops of a prompt and the last message."""
    known = template in TEMPLATES
    tokenizer = template_tokenizer(template) if known else tiny_tokenizer(template, bos="<s>")
    return dropped_parts(Renderer(tokenizer), list(messages[:-1]), [messages[-1]], tools)


WRITES_TOOLS = {"qwen3", "qwen3_5", "smollm3", "glm4", "glm4_5", "gpt_oss", "mistral"}
WRITES_CALLS = {"qwen3", "qwen3_5", "glm4_5", "gpt_oss", "mistral"}
WRITES_THINKING = {"qwen3", "qwen3_5", "glm4_5", "gpt_oss"}
DROPS_SYSTEM = {"mistral"}


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - {"deepseek_r1"}))
def test_each_template(name: str) -> None:
    assert dropped(name, Q, A) == 0
    assert dropped(name, Q, A, tools=TOOLS) == Dropped.TOOLS * (name not in WRITES_TOOLS)
    assert dropped(name, Q, WITH_CALL) == Dropped.TOOL_CALLS * (name not in WRITES_CALLS)
    assert dropped(name, Q, THINKING) == Dropped.THINKING * (name not in WRITES_THINKING)
    if name != "gemma2":  # which rejects it
        # Long enough for a look, and too short for it.
        for text in ("Be kind and helpful to everybody.", "W"):
            messages = (system(text), Q, A)
            assert dropped(name, *messages) == Dropped.SYSTEM * (name in DROPS_SYSTEM)


def test_a_template_that_takes_arguments_as_json_text() -> None:
    call = {"type": "function", "function": {"name": "sky", "arguments": '{"place": "here"}'}}
    assert dropped("deepseek_r1", Q, assistant("", tool_calls=[call])) == 0
    assert dropped("deepseek_r1", Q, A, tools=TOOLS) == Dropped.TOOLS
    inline = assistant("<think>\nLet me see.\n</think>\n\nBecause.")
    assert dropped("deepseek_r1", Q, inline) == Dropped.THINKING


@pytest.mark.parametrize("arguments", [None, {}, "{}", "{", "[1]", "null"])
def test_arguments_without_values_need_not_be_written(arguments: Any) -> None:
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    template += "{{ c.function.arguments }}{% endfor %}{% endfor %}"
    function = {"name": "sky", "arguments": arguments}
    assert dropped(template, Q, assistant("", tool_calls=[{"function": function}])) == 0


def test_a_call_must_be_written_with_its_arguments() -> None:
    template = "{% for m in messages %}{{ m.tool_calls[0].function.name if m.tool_calls }}"
    assert dropped(template + "{% endfor %}", Q, WITH_CALL) == Dropped.TOOL_CALLS
    with_arguments = template + "{{ m.tool_calls[0].function.arguments if m.tool_calls }}"
    assert dropped(with_arguments + "{% endfor %}", Q, WITH_CALL) == 0


def test_every_call_counts() -> None:
    template = "{% for m in messages %}{{ m.tool_calls[0] if m.tool_calls }}{% endfor %}"
    assert dropped(template, Q, WITH_CALL) == 0
    two = assistant("", tool_calls=[CALL, CALL])
    assert dropped(template, Q, two) == Dropped.TOOL_CALLS


def test_calls_without_a_function_and_of_no_form() -> None:
    bare = {"name": "sky", "arguments": {"place": "here"}}
    template = "{% for m in messages %}{{ m.tool_calls }}{% endfor %}"
    assert dropped(template, Q, assistant("", tool_calls=[bare])) == 0
    for strange in (["x"], "x", [{"function": "x"}], [{}]):
        assert dropped(template, Q, assistant("", tool_calls=strange)) == 0
        assert dropped("x", Q, assistant("", tool_calls=strange)) == 0


def test_words_of_the_conversation_are_no_trace_of_tools() -> None:
    """The prompt may say "sky" whether or not the template offers a tool of this name."""
    question = user("Which sky?")
    assert dropped("llama3", question, assistant("The sky here."), tools=TOOLS) == Dropped.TOOLS
    with_call = assistant("The sky here.", tool_calls=[CALL])
    assert dropped("llama3", question, with_call) == Dropped.TOOL_CALLS


def test_tools_of_any_form() -> None:
    assert dropped("qwen3", Q, A, tools=[{"name": "sky"}]) == 0
    for strange in ([{}], [{"function": {"name": 1}}], [{"function": []}]):
        assert dropped("llama3", Q, A, tools=strange) == Dropped.TOOLS


def test_a_system_text_that_is_written_differently_is_written() -> None:
    template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    assert dropped(template, system("be kind and helpful to everybody"), Q, A) == 0
    assert dropped("smollm3", system("Be kind and helpful. /no_think"), Q, A) == 0
    assert dropped("x", system(" "), Q, A) == 0


def test_thinking_of_earlier_turns_may_go() -> None:
    messages = [Q, THINKING, user("And?"), A]
    assert dropped("qwen3", *messages) == 0
    renderer = Renderer(template_tokenizer("qwen3"))
    # The first turn of this response is an earlier turn, too; but its thinking is to be learned.
    assert dropped_parts(renderer, messages[:1], messages[1:], None) == Dropped.THINKING


def test_null_that_is_written_as_a_word() -> None:
    """transformers 5 leaves null out of messages; templates in Python and older versions do not."""

    class Tokenizer(type(tiny_tokenizer())):
        def apply_chat_template(self, messages: list[Message], **options: Any) -> str:
            word = {"json": "null"}.get(self.form, "None")
            contents = [m.get("content") for m in messages]
            return " ".join(word if text is None else text for text in contents)

    null = assistant(None, tool_calls=[CALL])
    tokenizer = tiny_tokenizer()
    tokenizer.__class__ = Tokenizer
    for form in ("json", "python"):
        tokenizer.form = form
        renderer = Renderer(tokenizer)
        expected = Dropped.NULL_CONTENT | Dropped.TOOL_CALLS
        assert dropped_parts(renderer, [user("None, null")], [null], None) == expected
        assert dropped_parts(renderer, [Q], [A], None) == 0
    assert dropped("qwen3", Q, null) == 0


def test_a_template_that_rejects_every_change_drops_nothing_as_far_as_is_known() -> None:
    template = "{% if messages[0].content != 'sys' %}{{ raise_exception('no') }}{% endif %}"
    template += "{% if not tools %}{{ raise_exception('no') }}{% endif %}sky place"
    assert dropped(template, system("sys"), Q, A, tools=TOOLS) == 0


def test_special_parts() -> None:
    assert special_parts([Q, A], None) == special_parts([Q, A], []) == 0
    assert special_parts([Q], TOOLS) == Dropped.TOOLS
    every = [system("s"), Q, assistant(None, tool_calls=[CALL]), THINKING]
    parts = Dropped.TOOL_CALLS | Dropped.SYSTEM | Dropped.THINKING | Dropped.NULL_CONTENT
    assert special_parts(every, None) == parts
    assert special_parts([{"role": "developer", "content": "s"}], None) == Dropped.SYSTEM


# --- in encoded pairs -----------------------------------------------------------------------------


@pytest.mark.parametrize("compat", [None, "official"])
def test_pairs_have_the_parts_of_both_responses(compat: Any) -> None:
    encoder = Encoder(template_tokenizer("llama3"), DataConfig(compat=compat))
    encoded = encoder.encode(Pair([Q], [THINKING], [assistant("No", tool_calls=[CALL])]))
    assert encoded.dropped == Dropped.THINKING | Dropped.TOOL_CALLS
    assert encoder.encode(Pair([Q], [A], [assistant("No")])).dropped == 0


def test_a_prompt_that_is_not_continued_is_a_part() -> None:
    encoder = Encoder(template_tokenizer("deepseek_r1"), DataConfig())
    assert encoder.encode(Pair("Why?", "Because.", "No")).dropped == Dropped.PROMPT


def test_the_numbers_are_those_of_cached_tokens() -> None:
    numbers = {"TOOLS": 1, "TOOL_CALLS": 2, "SYSTEM": 4, "THINKING": 8, "NULL_CONTENT": 16}
    assert {str(flag.name): int(flag) for flag in Dropped} == {**numbers, "PROMPT": 32}


def test_a_response_of_which_nothing_is_left_is_not_trained_on() -> None:
    encoder = Encoder(template_tokenizer("llama3"), DataConfig())
    pair = Pair([Q], [assistant("", tool_calls=[CALL])], [A])
    with pytest.raises(InvalidRecordError) as caught:
        encoder.encode(pair)
    assert caught.value.args == ("empty response", "the chat template writes nothing of chosen")
    encoder = Encoder(tiny_tokenizer(), DataConfig(score="after_thinking"))
    with pytest.raises(InvalidRecordError, match="nothing of rejected after its thinking"):
        encoder.encode(Pair("Why?", "Because.", "<think>Let me see.</think>"))


def test_responses_that_differ_in_dropped_thinking_are_identical() -> None:
    other = assistant("Because.", reasoning_content="Well, well.")
    encoder = Encoder(template_tokenizer("llama3"), DataConfig())
    with pytest.raises(InvalidRecordError, match="identical responses") as caught:
        encoder.encode(Pair([Q], [THINKING], [other]))
    assert "without the thinking, which the chat template drops" in caught.value.args[1]


def test_a_template_for_turns_of_two_roles_rejects_system_text() -> None:
    with pytest.raises(InvalidRecordError, match="rejected by the chat template"):
        dropped(INST, system("s"), Q, A)


def test_a_developers_turn_is_a_system_turn() -> None:
    template = "{% for m in messages if m.role != 'developer' %}{{ m.content }}{% endfor %}"
    developer = {"role": "developer", "content": "Be kind and helpful to everybody."}
    assert dropped(template, developer, Q, A) == Dropped.SYSTEM


def test_every_tool_counts() -> None:
    template = "{{ tools[0].function.name if tools }}{% for m in messages %}{{ m.content }}"
    tools = [*TOOLS, {"type": "function", "function": {"name": "sea"}}]
    assert dropped(template + "{% endfor %}", Q, A, tools=TOOLS) == 0
    assert dropped(template + "{% endfor %}", Q, A, tools=tools) == Dropped.TOOLS
