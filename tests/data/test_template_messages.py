"""What the user is told about a template's work on a dataset."""

from pathlib import Path
from typing import Any

import pytest
from helpers.chat_templates import TEMPLATES, template_tokenizer
from helpers.tiny import assistant, system, tiny_tokenizer, user
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_simpo import DataConfig
from mlx_simpo.data.encode import Encoder, encode_pairs
from mlx_simpo.data.records import Message, Pair
from mlx_simpo.data.render import Renderer
from mlx_simpo.data.template_messages import (
    TemplateMessages,
    missing_in_training,
    same_prompt_argument,
    template_messages,
)
from mlx_simpo.data.tokens import TokenizedPairs, TokenWriter

Q, A, B = user("Why?"), assistant("Because."), assistant("No")
CALL = {"type": "function", "function": {"name": "sky", "arguments": {"place": "here"}}}
TOOLS: list[Any] = [{"type": "function", "function": {"name": "sky"}}]


def messages(
    name: str, *responses: list[Message], arguments: dict | None = None, **more: Any
) -> TemplateMessages:
    """What is told about pairs with these chosen responses."""
    encoder = Encoder(template_tokenizer(name), DataConfig(template_args=arguments))
    prompt = more.pop("prompt", [Q])
    pairs = [
        Pair(prompt, chosen, [B], i, f"f.jsonl:{i + 1}", **more)
        for i, chosen in enumerate(responses)
    ]
    encoded, quarantined = encode_pairs(encoder, pairs)
    assert quarantined == []
    return template_messages(encoder, encoded)


def test_an_empty_think_block() -> None:
    thinking = assistant("Because.", reasoning_content="Let me see.")
    notes, warnings = messages("qwen3", [A], [thinking], [A])
    assert warnings == []
    assert notes == [
        r"the chat template itself writes '<think>\n\n</think>\n\n' before the responses of 3 of 3 "
        "pairs; it is not scored; set data.template_args.enable_thinking=false, so that the model "
        "is prompted with it in evaluate and generate, too"
    ]
    assert messages("qwen3", [A], arguments={"enable_thinking": False}) == ([], [])


def test_pairs_are_counted_whose_responses_have_it() -> None:
    thinking = assistant("Because.", reasoning_content="Let me see.")
    encoder = Encoder(template_tokenizer("glm4_5"), DataConfig())
    other = assistant("No", reasoning_content="Well")
    pairs = [Pair([Q], [thinking], [other]), Pair([Q], [A], [B])]
    notes, _ = template_messages(encoder, encode_pairs(encoder, pairs)[0])
    # The line break that stays before real thinking is not worth a note.
    assert r"'\n<think></think>\n' before the responses of 1 of 2 pairs" in notes[0]


def test_no_argument_helps() -> None:
    notes, _ = messages("gpt_oss", [A])
    assert notes == [
        "the chat template itself writes '<|channel|>final<|message|>' before the responses of 1 "
        "of 1 pairs; it is not scored; no argument of the template prompts the model with it: it "
        "has to write it itself"
    ]


@pytest.mark.parametrize("name", ["glm4", "mistral", "llama3", "gemma3", "phi4", "smollm3"])
def test_white_space_is_not_worth_a_note(name: str) -> None:
    assert messages(name, [A]) == ([], [])


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_which_argument_makes_the_same_prompt(name: str) -> None:
    has_one = name in ("qwen3", "qwen3_5", "glm4_5")
    expected = {"enable_thinking": False} if has_one else {}
    assert same_prompt_argument(Renderer(template_tokenizer(name))) == expected


def test_a_template_that_rejects_plain_conversations() -> None:
    renderer = Renderer(tiny_tokenizer("{{ thinking }}{{ raise_exception('no') }}"))
    assert renderer.variables == {"thinking"}
    assert same_prompt_argument(renderer) == {}
    assert missing_in_training(renderer) == ""


def test_a_prompt_that_is_not_continued() -> None:
    (_, (warning,)) = messages("deepseek_r1", [A])
    assert warning == (
        "the chat template writes the conversations of 1 of 1 pairs (e.g. f.jsonl:1) differently "
        "than the prompt that evaluate and generate give to the model: before a response there is "
        r"no '<think>\n'; the model learns from one and is asked with the other: use a template "
        "that writes both alike (data.chat_template=FILE)"
    )


def test_an_argument_with_which_the_prompt_is_continued() -> None:
    """As with Nemotron 3: its prompt opens a block on a line of its own, responses have none."""
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ '<think></think>' if m.role == 'assistant' }}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant><think>"
        "{{ '</think>' if enable_thinking is false else '\n' }}{% endif %}"
    )
    tokenizer = TokenizerWrapper(template_tokenizer("qwen3", wrapped=False))
    encoder = Encoder(tokenizer, DataConfig(chat_template=template))
    encoded, _ = encode_pairs(encoder, [Pair("Why?", "Because.", "No", 0, "f:1")])
    response = encoded[0].chosen.tokens[encoded[0].chosen.score_start :].tolist()
    assert tokenizer.decode(response).startswith("Because.")
    notes, (warning,) = template_messages(encoder, encoded)
    assert notes == []
    assert "set data.template_args.enable_thinking=false, or use a template" in warning


def test_one_warning_for_each_kind_with_its_first_pair() -> None:
    thinking = assistant("Because.", reasoning_content="Let me see.")
    with_call = assistant("Because.", tool_calls=[CALL])
    _, warnings = messages("llama3", [A], [thinking], [with_call], [with_call], tools=TOOLS)
    assert [warning.partition(":")[0] for warning in warnings] == [
        "the chat template does not write the tools of 4 of 4 pairs (e.g. f.jsonl",
        "the chat template does not write the tool calls of 2 of 4 pairs (e.g. f.jsonl",
        "the chat template does not write the thinking of the responses in 1 of 4 pairs (e.g. "
        "f.jsonl",
    ]
    assert [warning.partition("f.jsonl:")[2][:2] for warning in warnings] == ["1)", "3)", "2)"]
    assert all("data.chat_template=FILE" in warning for warning in warnings)


def test_a_system_text_that_vanishes() -> None:
    _, warnings = messages("mistral", [A], prompt=[system("Be kind."), Q])
    assert warnings[0] == (
        "the chat template does not write the system text of 1 of 1 pairs (e.g. f.jsonl:1): the "
        "model will not see it; move the text into the first user turn, or use a template that "
        "writes it (data.chat_template=FILE)"
    )
    assert "differently than the prompt" in warnings[1]


def test_plain_text_has_no_template_to_speak_of() -> None:
    encoder = Encoder(tiny_tokenizer(None), DataConfig())
    encoded, _ = encode_pairs(encoder, [Pair("Why?", "Because.", "No")])
    assert template_messages(encoder, encoded) == ([], [])
    assert template_messages(encoder, []) == ([], [])


def test_pairs_on_disk_tell_the_same(tmp_path: Path) -> None:
    encoder = Encoder(template_tokenizer("qwen3"), DataConfig())
    pairs = [Pair([Q], [A], [B], i, f"f:{i}", tools=TOOLS) for i in range(3)]
    encoded, _ = encode_pairs(encoder, pairs)
    with TokenWriter(tmp_path) as writer:
        for pair in encoded:
            writer.add(pair, b"")
    stored = TokenizedPairs(tmp_path)
    assert template_messages(encoder, stored) == template_messages(encoder, encoded)
    assert template_messages(encoder, stored).notes


@pytest.mark.parametrize("is_chosen", [False, True])
def test_the_text_is_that_of_the_response_that_has_it(is_chosen: bool) -> None:
    """Thinking longer than the block: the first tokens of the other response are none of it."""
    thinking = assistant("Because.", reasoning_content="Let me see.")
    encoder = Encoder(template_tokenizer("qwen3"), DataConfig())
    both = ([thinking], [B]) if is_chosen else ([B], [thinking])
    notes, _ = template_messages(encoder, encode_pairs(encoder, [Pair([Q], *both)])[0])
    assert r"itself writes '<think>\n\n</think>\n\n' before the responses of 1 of 1" in notes[0]
