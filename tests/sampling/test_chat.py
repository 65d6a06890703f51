"""Chats: each response as if the whole conversation had been read, without reading it again."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import BARE, CHATML, INST, tiny_model, tiny_tokenizer, user
from mlx.utils import tree_map
from mlx_lm import generate as mlx_lm_generate

from mlx_simpo import DataConfig, LoRAConfig, SamplingSettings, SimPOError
from mlx_simpo.data.encode import Encoder
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.model.switch import AdapterSwitch
from mlx_simpo.sampling import chat as chat_module
from mlx_simpo.sampling.chat import Chat
from mlx_simpo.sampling.generate import generate_response
from mlx_simpo.sampling.prompts import NamedPrompt, prompt_tokens
from mlx_simpo.sampling.responder import Responder

SHORT = SamplingSettings(max_tokens=10)
MESSAGES = ("Why is the sky blue?", "Be kind.", "numbers 0 1 2 3", "Why?")
# Earlier turns of the assistant lose their first word, as thinking is removed by some templates.
FORGETFUL = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'][6:] }}"
    "{% else %}{{ m['content'] }}{% endif %}",
)
# mlx-lm's caches: of keys and values, of the last tokens only, and of a recurrent state.
MODELS: dict[str, Callable[[], Any]] = {
    "llama": tiny_model,
    "window": lambda: tiny_model(
        "gemma3_text", sliding_window=24, sliding_window_pattern=2, query_pre_attn_scalar=8
    ),
    "recurrent": lambda: tiny_model(
        "mamba",
        state_size=4,
        conv_kernel=4,
        use_bias=False,
        use_conv_bias=True,
        time_step_rank=4,
    ),
}


def responder(model: Any, template: str | None = CHATML, *, adapter: bool = False) -> Any:
    """A Responder; typed as Any for its model's sake (see `tiny_model`)."""
    tokenizer = tiny_tokenizer(template, bos="<s>")
    switch = None
    if adapter:
        attach_lora(model, LoRAConfig(rank=4), seed=0)
        mx.random.seed(7)
        trained = tree_map(lambda p: mx.random.normal(p.shape) * 0.3, model.trainable_parameters())
        model.update(trained)
        switch = AdapterSwitch(model)
    model.eval()
    return Responder(model, tokenizer, Encoder(tokenizer, DataConfig()), switch)


def say(chat: Chat, text: str, **options: Any) -> str:
    return "".join(part.text for part in chat.send(text, **options))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens the model reads before each response."""
    counts: list[int] = []
    stream = chat_module.stream_response

    def counting(model: Any, tokenizer: Any, tokens: list[int], *rest: Any, **options: Any) -> Any:
        counts.append(len(tokens))
        return stream(model, tokenizer, tokens, *rest, **options)

    monkeypatch.setattr(chat_module, "stream_response", counting)
    return counts


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("template", [CHATML, INST, BARE, FORGETFUL])
def test_each_response_is_that_to_the_whole_conversation(model: str, template: str) -> None:
    ours = responder(MODELS[model](), template)
    chat = Chat(ours, SHORT)
    for text in MESSAGES:
        expected = generate_response(
            ours.model,
            ours.tokenizer,
            prompt_tokens(ours.encoder, NamedPrompt([*chat.messages, user(text)])),
            SHORT,
        )
        assert say(chat, text) == expected.text
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 4


def test_it_is_mlx_lms_response_to_the_whole_conversation() -> None:
    ours = responder(tiny_model())
    chat = Chat(ours, SHORT, "Be brief.")
    say(chat, MESSAGES[0])
    text = ours.tokenizer.apply_chat_template(
        [*chat.messages, user(MESSAGES[1])], tokenize=False, add_generation_prompt=True
    )
    expected = mlx_lm_generate(ours.model, ours.tokenizer, text, max_tokens=10)
    assert say(chat, MESSAGES[1]) == expected.strip()
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_only_what_is_new_is_read(read: list[int]) -> None:
    ours = responder(tiny_model())
    chat = Chat(ours, SHORT)
    lengths = []
    for text in MESSAGES:
        prompt = NamedPrompt([*chat.messages, user(text)])
        lengths.append(len(prompt_tokens(ours.encoder, prompt)))
        say(chat, text)
    assert read[0] == lengths[0]
    # The header of the new turns and their text; a response may come back as other tokens.
    assert all(count <= 40 for count in read[1:])
    assert sum(read) < sum(lengths) / 1.5


def test_recurrent_layers_read_everything_again_only_if_the_beginning_changes(
    read: list[int],
) -> None:
    ours = responder(MODELS["recurrent"](), FORGETFUL)
    chat = Chat(ours, SHORT)
    for text in MESSAGES[:3]:
        length = len(prompt_tokens(ours.encoder, NamedPrompt([*chat.messages, user(text)])))
        say(chat, text)
        assert read[-1] == length


def test_reset_begins_a_new_conversation() -> None:
    chat = Chat(responder(tiny_model()), SHORT, "Be brief.")
    first = say(chat, MESSAGES[0])
    say(chat, MESSAGES[1])
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert say(chat, MESSAGES[0]) == first


def test_the_base_model_and_the_adapter_take_turns() -> None:
    ours = responder(tiny_model(), adapter=True)
    chat = Chat(ours, SHORT)
    assert chat.uses_adapter
    adapted = say(chat, MESSAGES[0])
    chat.toggle_adapter()
    chat.reset()
    base = Chat(responder(tiny_model()), SHORT)
    assert say(chat, MESSAGES[0]) == say(base, MESSAGES[0]) != adapted
    # The base model goes on with its own keys and values, the adapter not with those.
    assert say(chat, MESSAGES[1]) == say(base, MESSAGES[1])
    chat.toggle_adapter()
    tokens = prompt_tokens(ours.encoder, NamedPrompt([*chat.messages, user(MESSAGES[2])]))
    expected = generate_response(ours.model, ours.tokenizer, tokens, SHORT).text
    assert say(chat, MESSAGES[2]) == expected


def test_a_stopped_response_stays_as_far_as_it_came(read: list[int]) -> None:
    ours = responder(tiny_model())
    chat = Chat(ours, SamplingSettings(max_tokens=30))
    asked: list[None] = []

    def after_five() -> bool:
        asked.append(None)
        return len(asked) >= 6  # once before the first token

    text = say(chat, MESSAGES[0], should_stop=after_five)
    assert text
    assert chat.messages == [user(MESSAGES[0]), {"role": "assistant", "content": text}]
    whole = generate_response(
        ours.model,
        ours.tokenizer,
        prompt_tokens(ours.encoder, NamedPrompt(MESSAGES[0])),
        SamplingSettings(max_tokens=30),
    )
    assert whole.text.startswith(text)
    assert whole.text != text
    tokens = prompt_tokens(ours.encoder, NamedPrompt([*chat.messages, user(MESSAGES[1])]))
    expected = generate_response(ours.model, ours.tokenizer, tokens, SamplingSettings(30)).text
    assert say(chat, MESSAGES[1]) == expected
    assert read[1] < len(tokens) / 1.5


def test_a_response_that_is_stopped_before_it_begins_leaves_nothing() -> None:
    chat = Chat(responder(tiny_model()), SHORT)
    first = say(chat, MESSAGES[0])
    before = list(chat.messages)
    assert say(chat, MESSAGES[1], should_stop=lambda: True) == ""
    assert chat.messages == before
    chat.reset()
    assert say(chat, MESSAGES[0]) == first


@pytest.mark.parametrize("template", [CHATML, FORGETFUL])
def test_an_error_in_the_middle_of_a_response_does_not_spoil_the_next(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some layers have read a token then, and others have not."""
    ours = responder(tiny_model(), template)
    chat = Chat(ours, SHORT)
    layer = ours.model.layers[1].__class__
    call, calls = layer.__call__, []

    def failing(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) == 8 and self is ours.model.layers[1]:
            raise KeyboardInterrupt
        return call(self, *arguments, **options)

    monkeypatch.setattr(layer, "__call__", failing)
    with pytest.raises(KeyboardInterrupt):
        say(chat, MESSAGES[0])
    monkeypatch.undo()
    tokens = prompt_tokens(ours.encoder, NamedPrompt([*chat.messages, user(MESSAGES[1])]))
    expected = generate_response(ours.model, ours.tokenizer, tokens, SHORT).text
    assert say(chat, MESSAGES[1]) == expected


def test_the_same_seed_gives_the_same_chat_and_turns_differ() -> None:
    sampled = SamplingSettings(max_tokens=10, temperature=1.5, seed=2**32 - 1)
    chats = [Chat(responder(tiny_model()), sampled) for _ in range(2)]
    mx.random.seed(3)
    state = np.array(mx.random.normal((2,)))
    mx.random.seed(3)
    first, second = ([say(chat, MESSAGES[0]) for _ in range(3)] for chat in chats)
    assert first == second
    assert len(set(first)) == 3
    np.testing.assert_array_equal(np.array(mx.random.normal((2,))), state)
    unseeded = SamplingSettings(max_tokens=10, temperature=1.5)
    others = {say(Chat(responder(tiny_model()), unseeded), MESSAGES[0]) for _ in range(3)}
    assert len(others) > 1


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {}, "a chat needs a chat template, and the one in use is none, the tokenizer has"),
        (INST, {"system_prompt": "x"}, "the system prompt cannot be used"),
        (CHATML, {"settings": SamplingSettings(0)}, "max_tokens is 0"),
    ],
)
def test_what_cannot_be_a_chat(template: str | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SimPOError) as raised:
        Chat(responder(tiny_model(), template), **{"settings": SHORT, **options})
    assert message in str(raised.value)


def test_a_message_that_cannot_be_used_changes_nothing() -> None:
    chat = Chat(responder(tiny_model(), INST), SHORT)
    first = say(chat, MESSAGES[0])
    before = list(chat.messages)
    with pytest.raises(SimPOError, match="the message is empty"):
        say(chat, " ")
    with pytest.raises(SimPOError, match="the message cannot be used: invalid Unicode text"):
        say(chat, "a \udcff")
    assert chat.messages == before
    with pytest.raises(SimPOError, match="there is no adapter; start with --adapter"):
        chat.toggle_adapter()
    chat.reset()
    assert say(chat, MESSAGES[0]) == first
