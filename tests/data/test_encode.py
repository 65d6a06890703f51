"""Scored are the response and the one token that ends it, never the prompt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_templates import template_tokenizer
from helpers.tiny import BARE, CHATML, INST, assistant, system, tiny_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo import DataConfig, SimPOError
from mlx_simpo.data.encode import EncodedPair, Encoder, TokenizedSequence, encode_pairs
from mlx_simpo.data.records import Pair
from mlx_simpo.data.rows import InvalidRecordError
from mlx_simpo.model.loading import load_only_tokenizer

TINY = tiny_tokenizer()
Q, A, B = user("Why?"), assistant("Because."), assistant("No")
STRINGS, CHATS = Pair("Why?", "Because.", "No"), Pair([Q], [A], [B])
TURN = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
ASKED = f"<|im_start|>system\nBe kind.<|im_end|>\n{TURN}"


def make_encoder(
    template: str | None = CHATML, config: dict | None = None, **options: Any
) -> Encoder:
    return Encoder(tiny_tokenizer(template, **options), DataConfig(**(config or {})))


def ids(text: str) -> list[int]:
    """All tiny tokenizers have the same tokens."""
    return TINY.encode(text, add_special_tokens=False)


def unscored_text(sequence: TokenizedSequence) -> str:
    return TINY.decode(sequence.tokens[: sequence.score_start].tolist())


def response_text(sequence: TokenizedSequence) -> str:
    return TINY.decode(sequence.tokens[sequence.score_start :].tolist())


def response_tokens(sequence: TokenizedSequence, tokenizer: Any) -> list[str]:
    return [tokenizer.decode([token]) for token in sequence.tokens[sequence.score_start :].tolist()]


@pytest.mark.parametrize(
    ("template", "pair", "prompt", "end"),
    [
        (CHATML, STRINGS, ASKED, "<|im_end|>"),
        (CHATML, CHATS, ASKED, "<|im_end|>"),
        (CHATML, Pair([system("s"), Q], [A], [B]), ASKED.replace("Be kind.", "s"), "<|im_end|>"),
        (CHATML, Pair([Q, B, Q], [A], [B]), f"{ASKED}No<|im_end|>\n{TURN}", "<|im_end|>"),
        (None, STRINGS, "Why?", "</s>"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", CHATS, "Why?", "</s>"),
    ],
    ids=["strings", "messages", "system", "turns", "plain text", "no end of turn"],
)
def test_the_response_and_one_end_token_are_scored(
    template: str | None, pair: Pair, prompt: str, end: str
) -> None:
    encoded = make_encoder(template).encode(pair)
    for sequence, response in ((encoded.chosen, "Because."), (encoded.rejected, "No")):
        assert (unscored_text(sequence), response_text(sequence)) == (prompt, response + end)
        assert sequence.tokens.tolist() == ids(prompt) + ids(response) + ids(end)
        assert sequence.num_scored == len(ids(response)) + 1


@pytest.mark.parametrize(
    ("end", "change", "written"),
    [
        # Generation configs name end-of-turn tokens that the tokenizer does not call special.
        ("!", lambda tokenizer: tokenizer.add_eos_token(str(ids("!")[0])), "!"),
        # Special in tokenizer.json alone: the tokenizer's EOS is </s> here.
        ("<|im_end|>", lambda tokenizer: None, "<|im_end|>"),
        # An added token that is not special is a word of the response.
        ("<word>", lambda tokenizer: tokenizer._tokenizer.add_tokens(["<word>"]), "<word>\n</s>"),
    ],
    ids=["generation config", "special", "not special"],
)
def test_no_eos_after_another_end_of_turn_token(
    end: str, change: Callable[[Any], Any], written: str
) -> None:
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m.content }}" + end + "\n{% endfor %}")
    change(tokenizer)
    encoded = Encoder(tokenizer, DataConfig()).encode(CHATS)
    for sequence, response in ((encoded.chosen, "Because."), (encoded.rejected, "No")):
        tokens = sequence.tokens[sequence.score_start :].tolist()
        assert tokenizer.decode(tokens) == response + written


def test_tokens_from_nowhere() -> None:
    sequence = make_encoder().encode(CHATS).chosen
    assert EncodedPair(sequence, sequence) == EncodedPair(sequence, sequence, 0, "", 0, 0, 0, 0, 0)


def test_white_space_at_the_end_of_a_response_is_scored() -> None:
    encoded = make_encoder(BARE).encode(Pair("Why?", "Because \n", "No\n\n"))
    assert response_text(encoded.chosen).lstrip() == "Because \n\n</s>"
    assert response_text(encoded.rejected).lstrip() == "No\n\n\n</s>"


def test_plain_text_that_ends_with_eos_gets_no_second_one() -> None:
    encoded = make_encoder(None).encode(Pair("Why?", "Because</s>", "No"))
    assert response_text(encoded.chosen) == "Because</s>"
    assert response_text(encoded.rejected) == "No</s>"


def test_every_turn_after_the_prompt_is_scored() -> None:
    encoded = make_encoder().encode(Pair([Q], [B, {"role": "tool", "content": "blue"}, A], [B]))
    turns = ["No<|im_end|>\n", "tool\nblue<|im_end|>\n", "assistant\nBecause.<|im_end|>"]
    assert response_text(encoded.chosen) == "<|im_start|>".join(turns)
    assert unscored_text(encoded.chosen) == ASKED
    assert response_text(encoded.rejected) == "No<|im_end|>"


def test_tools_are_part_of_the_prompt() -> None:
    template = "{{ tools[0].function.name if tools }}\n" + BARE
    tools = [{"type": "function", "function": {"name": "sky"}}]
    encoded = make_encoder(template).encode(Pair([Q], [A], [B], tools=tools))
    assert unscored_text(encoded.rejected).startswith("sky\nuser: Why?")


# Template (or SmolLM2 with data.chat_template), prompt, responses, the tokens scored before the end
# token, and how many of them start in the prompt.
BOUNDARIES = [
    (CHATML, "Why?", " a", "b", [" a"], ["b"], 0),
    (CHATML, "Why?", "\n a", "b", ["\n", " a"], ["b"], 0),
    (BARE, "Why?", "a", " b", [" a", "\n"], [" ", " b", "\n"], 1),
    (None, "the a", "b", "nd", [" a", "b"], [" and"], 1),
    (None, "the a", "nd", "b", [" and"], [" a", "b"], 1),
    (None, "a", "nd", "b", [], ["b"], 0),  # nothing predicts the first token
    (None, "", "a b", "b", [" b"], [], 0),
    ("auto", "Why?", " Sure", "No", [" Sure"], ["No"], 0),
    ("auto", "Why?", "\n Sure", "No", ["\n\n", " Sure"], ["\n", "No"], 1),
    ("none", "It's unbeliev", "able", "er", ["vable"], ["ver"], 1),
]


@pytest.mark.parametrize("row", BOUNDARIES)
def test_tokens_merged_across_the_boundary_are_scored(smollm2_folder: Path, row: tuple) -> None:
    template, prompt, a, b, chosen, rejected, boundary_tokens = row
    encoder = make_encoder(template)
    if template in ("auto", "none"):
        tokenizer = load_only_tokenizer(str(smollm2_folder))
        encoder = Encoder(tokenizer, DataConfig(chat_template=template))
    encoded = encoder.encode(Pair(prompt, a, b))
    assert response_tokens(encoded.chosen, encoder.tokenizer)[:-1] == chosen
    assert response_tokens(encoded.rejected, encoder.tokenizer)[:-1] == rejected
    assert (encoded.chosen.tokens[-1], encoded.rejected.tokens[-1]) == (
        encoder.special.eos,
        encoder.special.eos,
    )
    assert encoded.boundary_tokens == boundary_tokens


def test_tokens_that_the_template_writes_after_the_prompt_are_counted() -> None:
    """Of the sequence that has more of them: Qwen3 writes an empty think block in one only."""
    encoder = Encoder(template_tokenizer("qwen3"), DataConfig())
    thinking, plain = [assistant("a", reasoning_content="so")], [B]
    for pair in (Pair([Q], thinking, plain), Pair([Q], plain, thinking)):
        encoded = encoder.encode(pair)
        starts = sorted((encoded.chosen.score_start, encoded.rejected.score_start))
        assert encoded.template_tokens == starts[1] - starts[0] == 4
        assert encoded.boundary_tokens == 0
    own = "{{ (' the dog:' if m.name else ':') if m.role == 'assistant' }}"
    encoder = make_encoder(f"{{% for m in messages %}}{own}{{{{ m.content }}}}{{% endfor %}}")
    for chosen, rejected in (([assistant("a", name="x")], [B]), ([A], [assistant("b", name="x")])):
        assert encoder.encode(Pair([Q], chosen, rejected)).template_tokens == len(ids(" the dog:"))


def test_a_token_of_prompt_and_template_text_together_counts_for_the_template() -> None:
    """The prompt ends with " a" here, and the template goes on with "nd:"."""
    own = "{{ (' and:' if messages[1:] else ' a') if loop.first }}"
    template = f"{{% for m in messages %}}{{{{ m.content }}}}{own}{{% endfor %}}"
    assert len(ids(" and:")) == 2
    encoded = make_encoder(template).encode(CHATS)
    assert unscored_text(encoded.chosen) == "Why? and:"
    assert (encoded.template_tokens, encoded.boundary_tokens) == (2, 0)
    longer_than_the_prompt = template.replace("and:", " the dog:").replace("' a'", "''")
    assert make_encoder(longer_than_the_prompt).encode(Pair("is", "a", "b")).template_tokens == 4


TEXT = st.text(st.sampled_from("ab the.\n é🙂空1"), max_size=12)
RESPONSE = TEXT.filter(str.strip)
RESPONSES = st.tuples(RESPONSE, RESPONSE).filter(lambda both: both[0].lstrip() != both[1].lstrip())


@given(TEXT, TEXT, RESPONSES)
@settings(deadline=None, max_examples=80)
def test_scored_tokens_do_not_depend_on_the_prompt(
    first: str, prompt: str, responses: tuple
) -> None:
    """After a header that nothing merges with, a response has its own tokens, whatever precedes."""
    a, b = (response.lstrip() for response in responses)
    encoded = make_encoder().encode(
        Pair([user(first), A, user(prompt)], [assistant(a)], [assistant(b)])
    )
    for sequence, response in ((encoded.chosen, a), (encoded.rejected, b)):
        assert sequence.tokens[sequence.score_start :].tolist() == ids(f"{response}<|im_end|>")


@given(st.sampled_from([CHATML, INST, BARE, None]), TEXT, RESPONSES)
@settings(deadline=None, max_examples=120)
def test_unscored_and_scored_text_are_the_whole_conversation(
    template: str | None, prompt: str, responses: tuple
) -> None:
    encoder = make_encoder(template, bos="<s>", adds_bos=True)
    encoded = encoder.encode(Pair(prompt, *responses))
    prompt_tokens = encoder.prompt_tokens(prompt)
    start = encoded.chosen.score_start
    # What may be unscored: INST writes a space of its own before each response.
    before = prompt_tokens + ids(" ") * (template == INST)
    following = set(before[start : start + 1])
    end = {CHATML: "<|im_end|>", INST: "</s>", BARE: "\n</s>", None: "</s>"}[template]
    for sequence, response in zip((encoded.chosen, encoded.rejected), responses, strict=True):
        assert sequence.tokens[: sequence.score_start].tolist() == before[:start]
        whole = TINY.decode(before) + response + end
        assert unscored_text(sequence) + response_text(sequence) == whole
        assert response_text(sequence).endswith(response + end)  # whatever it starts with
        following.add(int(sequence.tokens[sequence.score_start]))
    assert encoded.boundary_tokens == max(0, len(prompt_tokens) - start)
    assert encoded.template_tokens == max(0, start - len(prompt_tokens))
    assert start == len(before) or len(following) > 1  # not before the three differ


@pytest.mark.parametrize(
    ("template", "adds_bos", "prompt", "count"),
    [
        (INST, True, "Why?", 1),
        (INST, False, "Why?", 1),
        (CHATML, True, "Why?", 1),
        (CHATML, False, "Why?", 0),
        (None, True, "<s>Why?", 1),
        (None, True, "", 1),
        (None, False, "Why?", 0),
        ("\n" + INST, True, "Why?", 1),
    ],
)
def test_bos(template: str | None, adds_bos: bool, prompt: str, count: int) -> None:
    encoder = make_encoder(template, bos="<s>", adds_bos=adds_bos)
    encoded = encoder.encode(Pair(prompt, "Because.", "No"))
    for tokens in (encoded.chosen.tokens, encoded.rejected.tokens, encoder.prompt_tokens(prompt)):
        assert list(tokens).count(ids("<s>")[0]) == count


def cut(sizes: tuple[int, int, int], limits: tuple[int, int], **options: Any) -> EncodedPair:
    """A plain-text pair of so many tokens (plus EOS), with (max_length, max_prompt_length)."""
    config = {"max_length": limits[0], "max_prompt_length": limits[1]}
    words = zip((" is", " sky", " sky"), (" the", " dog", " fox"), sizes, strict=True)
    prompt, chosen, rejected = (first + others * (size - 1) for first, others, size in words)
    return make_encoder(None, config, **options).encode(Pair(prompt, chosen, rejected))


@pytest.mark.parametrize(
    ("sizes", "limits", "remaining", "cuts"),
    [
        ((8, 3, 4), (13, 4), (8, 4, 5), (0, 0)),
        ((8, 3, 4), (12, 4), (7, 4, 5), (1, 0)),
        ((8, 3, 4), (8, 4), (4, 4, 4), (4, 1)),
        ((8, 9, 2), (12, 4), (4, 8, 3), (4, 2)),  # the shorter response is not cut
        ((3, 20, 2), (12, 8), (3, 9, 3), (0, 12)),  # a response may use the space of a short prompt
    ],
)
def test_what_is_cut(sizes: tuple, limits: tuple, remaining: tuple, cuts: tuple) -> None:
    encoded = cut(sizes, limits)
    lengths = (encoded.chosen.score_start, encoded.chosen.num_scored, encoded.rejected.num_scored)
    assert lengths == remaining
    assert (encoded.cut_prompt, encoded.cut_response) == cuts
    assert encoded.length == remaining[0] + max(remaining[1:])


@given(st.tuples(*[st.integers(2, 20)] * 3), st.integers(1, 20), st.integers(1, 20), st.booleans())
@settings(deadline=None, max_examples=120)
def test_the_rule_of_truncation(sizes: tuple, max_prompt: int, more: int, bos: bool) -> None:
    """In closed form: the prompt shrinks down to max_prompt, the responses have the rest."""
    limits = (max_prompt + more, max_prompt)
    options: dict[str, Any] = {"bos": "<s>", "adds_bos": True} if bos else {}
    whole = cut(sizes, (1000, 999), **options)
    before = whole.chosen.tokens.tolist()[: whole.chosen.score_start]
    responses = [s.tokens.tolist()[s.score_start :] for s in (whole.chosen, whole.rejected)]
    keep = min(len(before), max(max_prompt, limits[0] - max(map(len, responses))))
    head = before[:1] + before[len(before) - keep + 1 :] if bos else before[-keep:]
    tails = [response[: limits[0] - keep] for response in responses]
    if tails[0] == tails[1]:
        with pytest.raises(InvalidRecordError, match="identical responses"):
            cut(sizes, limits, **options)
        return
    encoded = cut(sizes, limits, **options)
    both = (encoded.chosen, encoded.rejected)
    assert [s.tokens.tolist() for s in both] == [head + tail for tail in tails]
    assert (encoded.chosen.score_start, encoded.rejected.score_start) == (keep, keep)
    assert encoded.cut_prompt == len(before) - keep
    assert encoded.cut_response == sum(map(len, responses)) - sum(map(len, tails))


def test_a_response_that_the_template_does_not_write_is_rejected() -> None:
    template = "q</s>{{ messages[1].content if messages[1] and messages[1].content != 'x' }}"
    for pair in (Pair("q", "x", "b"), Pair("q", "b", "x")):
        with pytest.raises(InvalidRecordError, match="no scored tokens left"):
            make_encoder(template).encode(pair)


NO_X = "{% for m in messages %}{{ '' if m.content == 'x' else m.content }}</s>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "pair", "config", "reason"),
    [
        (
            NO_X,
            Pair("q", "x", "b"),
            {},
            ("empty response", "the chat template writes nothing of chosen"),
        ),
        (
            NO_X,
            Pair("q", "b", "x"),
            {},
            ("empty response", "the chat template writes nothing of rejected"),
        ),
        (
            CHATML,
            Pair([Q], [assistant("<think>so</think> ")], [B]),
            {"score": "after_thinking"},
            ("empty response", "the chat template writes nothing of chosen after its thinking"),
        ),
        (
            None,
            Pair("the", " sky fox", " sky dog"),
            {"max_length": 2, "max_prompt_length": 1},
            ("identical responses", "after tokenization and truncation"),
        ),
        (
            CHATML,
            Pair([Q], [assistant("a", reasoning_content="so")], [assistant("a")]),
            {},
            (
                "identical responses",
                "after tokenization and truncation without the thinking, which the chat template "
                "drops",
            ),
        ),
    ],
    ids=["chosen", "rejected", "thinking alone", "cut", "thinking dropped"],
)
def test_what_leaves_no_preference_is_rejected(
    template: str | None, pair: Pair, config: dict, reason: tuple[str, str]
) -> None:
    with pytest.raises(InvalidRecordError) as caught:
        make_encoder(template, config).encode(pair)
    assert caught.value.args == reason


def test_a_conversation_without_a_template_stops_the_run() -> None:
    with pytest.raises(SimPOError, match=r"f:9 is a conversation.*data\.chat_template"):
        encode_pairs(make_encoder(None), [STRINGS, Pair([Q], [A], [B], 0, "f:9")])


def test_encode_pairs_keeps_the_order_and_returns_quarantined_records() -> None:
    steps: list[None] = []
    pairs = [Pair([turn, Q], [A], [B], i, f"f:{i}") for i, turn in enumerate([Q, system("s"), Q])]
    encoded, quarantined = encode_pairs(
        make_encoder(INST, bos="<s>"), pairs, lambda: steps.append(None)
    )
    assert [(p.index, p.source) for p in encoded] == [(0, "f:0"), (2, "f:2")]
    assert [(q.source, q.reason) for q in quarantined] == [("f:1", "rejected by the chat template")]
    assert len(steps) == 3


def test_what_the_model_reads_before_it_responds() -> None:
    """The prompt of training: with tools and the header; plain text where there is no template."""
    tools = [{"type": "function", "function": {"name": "sky"}}]
    encoder = make_encoder("{{ tools[0].function.name if tools }}\n" + BARE)
    for prompt in ([Q], "Why?"):
        assert encoder.prompt_tokens(prompt, tools) == ids("sky\nuser: Why?\nassistant: ")
        assert encoder.prompt_tokens(prompt) == ids("\nuser: Why?\nassistant: ")
    assert make_encoder(None).prompt_tokens("Why?") == ids("Why?")


def test_a_prompt_in_parts_is_the_text_that_they_say() -> None:
    """As in training, so that the model is asked in the way that it has learned."""
    encoder = Encoder(tiny_tokenizer(CHATML), DataConfig())
    parts = [{"role": "user", "content": [{"type": "text", "text": "Why"}, "?"]}]
    assert encoder.prompt_tokens(parts) == encoder.prompt_tokens("Why?")
