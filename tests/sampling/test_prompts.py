"""Prompts as tokens: those of training, and what cannot be a prompt."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import (
    BARE,
    CHATML,
    INST,
    assistant,
    some_pairs,
    system,
    tiny_model,
    tiny_tokenizer,
    user,
)

from mlx_simpo import DataConfig, SamplingSettings, SimPOError, load_pairs
from mlx_simpo.data.encode import Encoder
from mlx_simpo.sampling.prompts import (
    NamedPrompt,
    check_against_model,
    check_system_prompt,
    named,
    prompt_tokens,
    with_system_turn,
)

PROMPT = "Why is the sky blue?"
TOKENIZERS: dict[str, dict[str, Any]] = {
    "chatml": {"template": CHATML},
    "inst": {"template": INST, "bos": "<s>", "adds_bos": True},
    "bare": {"template": BARE},
    "no-template": {"template": None, "bos": "<s>", "adds_bos": True},
}
DROPS_SYSTEM = CHATML.replace("{% for m in messages %}", "{% for m in messages[-1:] %}")


def encoder(template: str | None = CHATML, **options: Any) -> Encoder:
    return Encoder(tiny_tokenizer(template, **options), DataConfig())


def text_of_prompt(encoder: Encoder, prompt: Any) -> str:
    return encoder.tokenizer.decode(prompt_tokens(encoder, NamedPrompt(prompt)))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "chatml",
            f"<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n{PROMPT}<|im_end|>\n"
            "<|im_start|>assistant\n",
        ),
        ("inst", f"<s>[INST] {PROMPT} [/INST]"),
        ("bare", f"user: {PROMPT}\nassistant: "),
        ("no-template", f"<s>{PROMPT}"),
    ],
)
def test_the_prompt_is_templated_once(name: str, text: str) -> None:
    assert text_of_prompt(encoder(**TOKENIZERS[name]), PROMPT) == text


def test_the_prompt_is_that_of_a_training_pair(pairs_file: Path) -> None:
    """With the assistant's header, after which the scored tokens begin."""
    ours = encoder()
    pair = ours.encode(load_pairs(str(pairs_file)).pairs[3])
    tokens = prompt_tokens(ours, NamedPrompt(some_pairs()[3]["prompt"]))
    assert tokens == pair.chosen.tokens[: pair.chosen.score_start].tolist()


def test_a_conversation_is_a_prompt() -> None:
    turns = [system("Be brief."), user("Hi"), assistant("Hello."), user(PROMPT)]
    assert text_of_prompt(encoder(BARE), turns) == (
        f"system: Be brief.\nuser: Hi\nassistant: Hello.\nuser: {PROMPT}\nassistant: "
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt 2 is empty; write what the model should respond to"),
        (" \n\t", "prompt 2 is empty"),
        ([], "prompt 2 is empty"),
        ([user(" ")], "prompt 2 is empty"),
        ([user("Hi"), assistant("Hello.")], "prompt 2 ends with a turn of the assistant"),
        ([system("Be kind.")], "prompt 2 ends with a turn of the system"),
        ([{"role": "pirate", "content": "Arr"}], "unknown role: prompt[0] has role 'pirate'"),
        (["Hi"], "prompt[0] is not a message"),
        ([user(None)], "missing content"),
        (7, "prompt 2 must be text or a list of messages, not 7"),
        ("a \ud83d b", "prompt 2 cannot be used: invalid Unicode text"),
    ],
)
def test_what_cannot_be_a_prompt(prompt: Any, message: str) -> None:
    with pytest.raises(SimPOError) as raised:
        prompt_tokens(encoder(), named(["fine", prompt])[1])
    assert message in str(raised.value)


def test_a_conversation_needs_a_template() -> None:
    with pytest.raises(SimPOError, match="is a conversation, and the chat template is none, the"):
        prompt_tokens(encoder(None), NamedPrompt([user("Hi")]))


def test_a_template_that_rejects_the_prompt_is_an_error() -> None:
    with pytest.raises(SimPOError, match=r"the prompt cannot be used: .*not today"):
        prompt_tokens(encoder("{{ raise_exception('not today') }}"), NamedPrompt(PROMPT))


def test_a_template_that_writes_nothing_is_an_error() -> None:
    with pytest.raises(SimPOError, match="the chat template leaves nothing of the prompt"):
        prompt_tokens(encoder("{{ '' }}"), NamedPrompt(PROMPT))


def test_the_arguments_of_the_template_are_those_of_training() -> None:
    template = "{{ mood }}: {{ messages[0]['content'] }}"
    config = DataConfig(template_args={"mood": "angry"})
    assert text_of_prompt(Encoder(tiny_tokenizer(template), config), PROMPT) == f"angry: {PROMPT}"


# --- system prompts --------------------------------------------------------------------------


def test_a_system_prompt_is_the_first_turn() -> None:
    prompt = with_system_turn(NamedPrompt("Hi"), "Be brief.")
    assert text_of_prompt(encoder(BARE), prompt.prompt) == (
        "system: Be brief.\nuser: Hi\nassistant: "
    )
    check_system_prompt(encoder(BARE), "Be brief.")
    check_system_prompt(encoder(CHATML), "Be kind.")  # the same as the template's own


def test_two_system_turns_are_an_error_unless_they_are_the_same() -> None:
    prompt = NamedPrompt([system("Be kind."), user("Hi")], "p.jsonl:4")
    assert with_system_turn(prompt, "Be kind. ") == prompt
    with pytest.raises(
        SimPOError, match=r"^p.jsonl:4 has a system turn of its own, and there is another"
    ):
        with_system_turn(prompt, "Be brief.")


@pytest.mark.parametrize(
    ("template", "text", "message"),
    [
        (INST, "Be brief.", "rejected by the chat template: only user and assistant turns; leave"),
        (DROPS_SYSTEM, "Be brief.", "the chat template drops system prompts, so that the model"),
        (None, "Be brief.", "a system prompt needs a chat template, and the one in use is none"),
        (CHATML, " ", "the system prompt is empty; write one, or leave it out"),
    ],
)
def test_a_system_prompt_that_the_model_would_not_see_is_an_error(
    template: str | None, text: str, message: str
) -> None:
    with pytest.raises(SimPOError) as raised:
        check_system_prompt(encoder(template, bos="<s>"), text)
    assert message in str(raised.value)


# --- the model -------------------------------------------------------------------------------


def test_tokens_and_top_k_are_checked_against_the_vocabulary() -> None:
    greedy, all_tokens = SamplingSettings(), SamplingSettings(temperature=1.0, top_k=512)
    tokens = prompt_tokens(encoder(), NamedPrompt(PROMPT))
    check_against_model(tokens, greedy, tiny_model())
    with pytest.raises(SimPOError, match=r"the prompt has token \d+, but the model has a vocab"):
        check_against_model(tokens, greedy, tiny_model(vocab_size=100))
    with pytest.raises(SimPOError, match="top_k is 512; it must be less than the 512 tokens"):
        check_against_model(tokens, all_tokens, tiny_model())
