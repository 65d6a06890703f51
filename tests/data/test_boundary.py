"""Where a response's own text begins: checked with offsets, not with the package's method."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from helpers.chat_templates import TEMPLATES, template_tokenizer
from helpers.tiny import assistant, some_pairs, system, tiny_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo import DataConfig
from mlx_simpo.data.boundary import BoundaryFinder, common_start, unused_character
from mlx_simpo.data.encode import EncodedPair, Encoder, TokenizedSequence, common_prefix
from mlx_simpo.data.messages import as_messages
from mlx_simpo.data.records import InvalidRecordError, Message, Pair
from mlx_simpo.data.render import Renderer

Q = user("Why?")
PROMPTS: list[list[Message]] = [
    [Q],
    [system("Be kind. /no_think"), Q],
    [Q, assistant("No"), user("And?")],
    [Q, assistant("No", reasoning_content="Well"), user("<think>And?</think>")],
]
VARIANTS = [
    *((name, None) for name in TEMPLATES),
    *((name, {"enable_thinking": False}) for name in ("qwen3", "qwen3_5", "smollm3", "glm4_5")),
]


def make_encoder(name: str, arguments: dict | None = None, **config: Any) -> Encoder:
    config = {"max_length": 100_000, "template_args": arguments, **config}
    return Encoder(template_tokenizer(name), DataConfig(**config))


# --- the oracle: two random texts in the response's place, and the tokens' offsets -------


class Frame(NamedTuple):
    """What a template writes around a response, as two random responses show it."""

    before: str
    after: str


def frame_of(renderer: Renderer, prompt: list[Message], rng: random.Random) -> Frame:
    frames = set()
    for first in rng.sample("QXZ", 2):
        word = f"{first}{rng.getrandbits(64):x}"
        before, after = renderer.render([*prompt, assistant(word)]).split(word)
        frames.add(Frame(before, after))
    (frame,) = frames
    return frame


def first_response_index(tokenizer: Any, text: str, start: int) -> int:
    """Return the index of the first token that has a character at or after ``start``."""
    offsets = tokenizer._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).offsets
    return next(i for i, (_, end) in enumerate(offsets) if end > start)


def check_pair(encoder: Encoder, pair: Pair, rng: random.Random) -> EncodedPair:
    """Scored are the tokens of the responses' text and one end of turn; and, if the tokenizer
    merges one response with what is before it, the same characters of the other."""
    tokenizer, renderer = encoder.tokenizer, encoder.renderer
    prompt = as_messages(pair.prompt, "user")
    encoded = encoder.encode(pair)
    frame = frame_of(renderer, prompt, rng)
    first = []
    for response in (pair.chosen, pair.rejected):
        messages = as_messages(response, "assistant")
        text = renderer.render(prompt + messages)
        assert text.startswith(frame.before)
        first.append(first_response_index(tokenizer, text, len(frame.before)))
        # All of the response is behind, and nothing but the end of its turn after it.
        own = text[len(frame.before) : len(text) - len(frame.after)]
        assert own in messages[0]["content"]
        assert messages[0]["content"].strip() in own
    for sequence, response in zip(
        (encoded.chosen, encoded.rejected), (pair.chosen, pair.rejected), strict=True
    ):
        assert sequence.score_start == min(first)
        actual = tokenizer.decode(sequence.tokens[sequence.score_start :].tolist())
        last = tokenizer.decode([int(sequence.tokens[-1])])
        assert int(sequence.tokens[-1]) in encoder.special.ends
        body = as_messages(response, "assistant")[0]["content"].strip()
        assert actual.strip().startswith(body)
        assert actual.strip().removeprefix(body).strip() == last
        assert not actual[: actual.index(body)].strip()  # nothing of a think block or a header
    return encoded


TEXT = st.text(st.sampled_from("ab the.\n <>é空1/think"), max_size=14)
RESPONSE = TEXT.filter(lambda text: text.strip() and "</think>" not in text)
RESPONSES = st.tuples(RESPONSE, RESPONSE).filter(lambda both: both[0].strip() != both[1].strip())


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_scored_text_is_the_responses(name: str, arguments: dict | None) -> None:
    encoder = make_encoder(name, arguments)
    rng = random.Random(name)

    @given(st.sampled_from(PROMPTS), RESPONSES)
    @settings(deadline=None, max_examples=25)
    def check(prompt: list[Message], responses: tuple[str, str]) -> None:
        if name == "gemma2" and prompt[0]["role"] == "system":
            prompt = prompt[1:]
        chosen, rejected = ([assistant(text)] for text in responses)
        check_pair(encoder, Pair(prompt, chosen, rejected), rng)

    check()


@pytest.mark.parametrize(("name", "arguments"), VARIANTS)
def test_scored_text_of_ordinary_pairs(name: str, arguments: dict | None) -> None:
    encoder, rng = make_encoder(name, arguments), random.Random(name)
    for pair in some_pairs(6):
        check_pair(encoder, Pair(**pair), rng)


def test_the_former_rule_scores_the_think_block() -> None:
    """Negative control: the prefix with the prompt alone, as it was."""
    encoder = make_encoder("qwen3")
    tokenizer = encoder.tokenizer
    encoded = check_pair(encoder, Pair("Why?", "Because.", "No"), random.Random(0))
    both = [sequence.tokens.tolist() for sequence in (encoded.chosen, encoded.rejected)]
    former = common_prefix(encoder.prompt_tokens("Why?"), *both)
    actual = tokenizer.decode(both[0][former:])
    assert actual == "<think>\n\n</think>\n\nBecause.<|im_end|>"
    assert encoded.template_tokens == encoded.chosen.score_start - former == 4


# --- what is before the responses -----------------------------------------------------


def texts(encoder: Encoder, pair: Pair) -> list[tuple[str, str]]:
    """Return (text after the last header that is not scored, scored text) of both sequences."""
    encoded = encoder.encode(pair)
    result = []
    for sequence in (encoded.chosen, encoded.rejected):
        before, after = split(encoder, sequence)
        result.append((before.rpartition("assistant")[2], after))
    return result


def split(encoder: Encoder, sequence: TokenizedSequence) -> tuple[str, str]:
    tokens, start = sequence.tokens.tolist(), sequence.score_start
    return encoder.tokenizer.decode(tokens[:start]), encoder.tokenizer.decode(tokens[start:])


def thoughts(text: str, key: bool) -> list[Message]:
    if key:
        return [assistant("final", reasoning_content=text)]
    return [assistant(f"<think>\n{text}\n</think>\n\nfinal")]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5", "glm4_5"])
@pytest.mark.parametrize("score", ["all", "after_thinking"])
def test_both_forms_of_thinking_give_the_same(name: str, score: str) -> None:
    encoder = make_encoder(name, score=score)
    in_key, in_content = (
        encoder.encode(Pair([Q], thoughts("one", key), thoughts("two", key)))
        for key in (True, False)
    )
    for a, b in ((in_key.chosen, in_content.chosen), (in_key.rejected, in_content.rejected)):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert a.score_start == b.score_start


@pytest.mark.parametrize("key", [True, False])
def test_thinking_is_scored_with_its_tags_or_not_at_all(key: bool) -> None:
    pair = Pair([Q], thoughts("one", key), thoughts("two", key))
    block, end = "<think>\n{}\n</think>\n\n", "final<|im_end|>"
    assert texts(make_encoder("qwen3"), pair) == [
        ("\n", block.format("one") + end),
        ("\n", block.format("two") + end),
    ]
    assert texts(make_encoder("qwen3", score="after_thinking"), replace(pair, rejected=[A])) == [
        ("\n" + block.format("one"), end),
        ("\n" + block.format(""), "Because.<|im_end|>"),
    ]


A = assistant("Because.")


def test_responses_with_and_without_thinking_start_apart() -> None:
    encoder = make_encoder("qwen3")
    encoded = encoder.encode(Pair([Q], thoughts("one", key=True), [A]))
    assert encoded.rejected.score_start == encoded.chosen.score_start + encoded.template_tokens
    assert encoded.template_tokens == 4
    assert [split(encoder, s)[1] for s in (encoded.chosen, encoded.rejected)] == [
        "<think>\none\n</think>\n\nfinal<|im_end|>",
        "Because.<|im_end|>",
    ]


@pytest.mark.parametrize("content", ["<", "<think>", "t", "\n", "th", "/think>", "h"])
def test_short_responses_are_not_located_in_the_think_block(content: str) -> None:
    """Whether or not the encoder has seen how the template ends a response."""
    responses = [assistant(content + " x"), assistant(content)]
    if not content.strip():
        responses = [assistant("x" + content), assistant("y")]
    for seen in (False, True):
        encoder = make_encoder("qwen3")
        if seen:
            encoder.encode(Pair("Why?", "Because.", "No"))
        for before, after in texts(encoder, Pair([Q], responses[:1], responses[1:])):
            assert before == "\n<think>\n\n</think>\n\n"
            assert "</think>" not in after.removeprefix("/think>").removeprefix("h")


def test_a_pair_has_the_same_tokens_whatever_came_before(pairs: list[Pair]) -> None:
    for name in TEMPLATES:
        used = make_encoder(name)
        encoded = [plain(used, pair) for pair in pairs]
        assert encoded == [plain(make_encoder(name), pair) for pair in pairs]
        assert encoded == [plain(used, pair) for pair in pairs]


@pytest.fixture
def pairs() -> list[Pair]:
    contents = ["a", " a", "a ", "\na", "<think>", "<think></think>a", "<think>\nb\n</think>\n\na"]
    pairs = [Pair([Q], [assistant(c)], [assistant("no")], i) for i, c in enumerate(contents)]
    with_key = assistant("a", thinking="b")
    return [*pairs, Pair([Q], [with_key], [assistant([{"type": "text", "text": "no"}])], 9)]


def plain(encoder: Encoder, pair: Pair) -> Any:
    try:
        encoded = encoder.encode(pair)
    except InvalidRecordError as error:
        return error.args
    both = (encoded.chosen, encoded.rejected)
    return [(s.tokens.tolist(), s.score_start) for s in both], encoded.template_tokens


def test_ordinary_templates_are_not_rendered_again() -> None:
    """The cost of the rule: nothing, once it is known how the template writes a response."""
    tokenizer = tiny_tokenizer()
    encoder = Encoder(tokenizer, DataConfig())
    encoder.encode(Pair("Why?", "Because.", "No"))
    calls = []
    render = encoder.renderer.render

    def counted(*args: Any, **options: Any) -> str:
        calls.append(args)
        return render(*args, **options)

    encoder.renderer.render = counted  # type: ignore[method-assign]
    for pair in some_pairs(4):
        encoder.encode(Pair(**pair))
    assert len(calls) == 4 * 3


# --- templates that do not go on as they prompt -------------------------------------------


def test_a_prompt_that_is_not_continued() -> None:
    """DeepSeek's generation prompt opens a think block that rendered responses do not have."""
    encoder = make_encoder("deepseek_r1")
    pair = Pair([Q], [assistant("<think>\nabc\n</think>\n\nBecause.")], [assistant("No")])
    encoded = encoder.encode(pair)
    assert split(encoder, encoded.chosen)[1] == "\n\nBecause.<｜end▁of▁sentence｜>"
    assert split(encoder, encoded.rejected)[1] == "No<｜end▁of▁sentence｜>"
    assert split(encoder, encoded.rejected)[0].endswith("<｜Assistant｜>")
    assert encoded.boundary_tokens == encoded.template_tokens == 0


def test_history_that_is_written_differently_is_not_scored() -> None:
    """gpt-oss drops the thinking before a tool call once a final response follows it."""
    calls = [{"function": {"name": "sky", "arguments": {"a": 1}}}]
    prompt = [
        Q,
        assistant("", thinking="Let me see.", tool_calls=calls),
        {"role": "tool", "content": "blue"},
    ]
    for extra in ({}, {"thinking": "So it is."}):
        pair = Pair(prompt, [assistant("Because.", **extra)], [assistant("No", **extra)])
        encoder = make_encoder("gpt_oss")
        before, after = split(encoder, encoder.encode(pair).chosen)
        assert "blue" in before
        assert after.endswith("Because.<|return|>")
        assert ("So it is." in after) == bool(extra)
        assert "blue" not in after


def test_a_template_that_rejects_every_change_ends_no_run() -> None:
    """Variants are written to find the boundary; if they are rejected, it is where prompts end."""
    template = (
        "{% for m in messages %}{% if m.content not in ['q', 'a', 'b'] %}"
        "{{ raise_exception('no') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    encoder = Encoder(tiny_tokenizer(template), DataConfig())
    encoded = encoder.encode(Pair("q", "a", "b"))
    assert split(encoder, encoded.chosen) == ("<user>q<assistant>", "a</s>")


@given(st.text(st.sampled_from("ab"), max_size=8), st.text(st.sampled_from("ab"), max_size=8))
def test_common_start(a: str, b: str) -> None:
    shared = common_start(a, b)
    assert a[:shared] == b[:shared]
    assert a[shared : shared + 1] != b[shared : shared + 1] or shared == len(a) == len(b)


def test_an_unused_character() -> None:
    first = unused_character("")
    assert unused_character(first) not in ("", first)
    assert not first.isspace()


def test_a_boundary_is_text_of_the_conversation() -> None:
    """For any template and message, known or not: a beginning of the text, after the prompt."""
    for name in TEMPLATES:
        renderer = Renderer(template_tokenizer(name))
        finder = BoundaryFinder(renderer, after_thinking=name < "m")
        for response in strange_responses():
            try:
                prompt_text = renderer.render([Q], generation=True)
                text = renderer.render([Q, *response])
                boundary = finder.boundary([Q], response, None, prompt_text, text)
            except InvalidRecordError:
                continue
            assert text.startswith(boundary.unscored)
            if boundary.continues_prompt:
                assert boundary.unscored.startswith(prompt_text)
            assert boundary.unscored.endswith(boundary.template_text)


def strange_responses() -> Iterator[list[Message]]:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    for content in ("", None, "x", "</think>", "<think>", "a</think>", "b<think>c</think>", ["x"]):
        yield [assistant(content)]
        yield [assistant(content, tool_calls=[call])]
        yield [assistant(content, reasoning_content="r"), Q, A]
        yield [assistant(content, thinking=""), {"role": "tool", "content": "t"}, A]


# --- what other conversations have shown ---------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "content"),
    [
        (("A", "."), ("B", "."), "b"),
        (("", ".."), ("P", "."), "PP"),
        (("", "Z."), ("P", "."), "bZ"),
    ],
)
def test_another_conversations_frame_does_not_mislead(
    first: tuple[str, str], second: tuple[str, str], content: str
) -> None:
    """A response that looks as if it stood in the frame of an earlier one."""
    frame = "{{ '%s' if messages[0].content == '1' else '%s' }}"
    before, after = (frame % both for both in zip(first, second, strict=True))
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}|{% else %}"
        + f"{before}{{{{ m.content }}}}{after}"
        + "{% endif %}{% endfor %}"
    )
    renderer = Renderer(tiny_tokenizer(template))
    finder = BoundaryFinder(renderer)
    for number, text, expected in (("1", "word", first[0]), ("2", content, second[0])):
        messages = [user(number)], [assistant(text)]
        whole = renderer.render([*messages[0], *messages[1]])
        boundary = finder.boundary(*messages, None, f"{number}|", whole)
        assert boundary.template_text == expected


def test_a_response_that_goes_on_is_not_told_by_how_it_would_end() -> None:
    """Qwen3 writes an empty think block into the last turn alone."""
    renderer = Renderer(template_tokenizer("qwen3"))
    response = [assistant("<think>x"), {"role": "tool", "content": "t"}, assistant("b")]
    prompt_text = renderer.render([Q], generation=True)
    text = renderer.render([Q, *response])
    assert text.startswith(f"{prompt_text}<think>x<|im_end|>")
    boundary = BoundaryFinder(renderer).boundary([Q], response, None, prompt_text, text)
    assert boundary.unscored == prompt_text


# --- tags where no template expects them ---------------------------------------------------

LOST = ("misplaced thinking", "the chat template loses text beside the tags of thinking")


@pytest.mark.parametrize("name", ["qwen3", "deepseek_r1"])
@pytest.mark.parametrize(
    "content",
    [
        "<think>a<think>b</think>c</think>d",
        "first <think>x</think> y",
        "<think>a</think><think>b</think>c",
        "<think>a<think>b</think>c",
    ],
)
def test_a_response_that_the_template_would_cut_is_quarantined(name: str, content: str) -> None:
    pair = Pair([Q], [assistant(content)], [A])
    assert plain(make_encoder(name), pair) == LOST
    assert plain(make_encoder("llama3"), pair) != LOST  # which writes it as it is


@pytest.mark.parametrize(
    "content", ["</think>x", "<think></think>x", " <think>\n</think>\nx", "<think>a", "a <think>"]
)
def test_a_response_that_the_template_does_not_cut_is_none(content: str) -> None:
    assert plain(make_encoder("qwen3"), Pair([Q], [assistant(content)], [A])) != LOST


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
def test_thinking_without_an_end_has_nothing_after_it(name: str) -> None:
    pair = Pair([Q], [assistant("\n<think>a")], [A])
    reason = ("empty response", "its thinking has no end")
    assert plain(make_encoder(name, score="after_thinking"), pair) == reason
    assert plain(make_encoder(name), pair) != reason
