"""TokenizedSequence are the answer and the one token that ends it, never the prompt."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import BARE, CHATML, INST, assistant, system, tiny_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo import DataConfig, SimPOError
from mlx_simpo.data.encode import EncodedPair, Encoder, TokenizedSequence, encode_pairs
from mlx_simpo.data.records import InvalidRecordError, Pair
from mlx_simpo.model.loading import load_only_tokenizer

TINY = tiny_tokenizer()
Q, A, B = user("Why?"), assistant("Because."), assistant("No")
STRINGS, CHATS = Pair("Why?", "Because.", "No"), Pair([Q], [A], [B])
TURN = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
ASKED = f"<|im_start|>system\nBe kind.<|im_end|>\n{TURN}"


def encoder(template: str | None = CHATML, config: dict | None = None, **options: Any) -> Encoder:
    return Encoder(tiny_tokenizer(template, **options), DataConfig(**(config or {})))


def ids(text: str) -> list[int]:
    """All tiny tokenizers have the same tokens."""
    return TINY.encode(text, add_special_tokens=False)


def read(side: TokenizedSequence) -> str:
    return TINY.decode(side.tokens[: side.score_start].tolist())


def scored(side: TokenizedSequence) -> str:
    return TINY.decode(side.tokens[side.score_start :].tolist())


def pieces(side: TokenizedSequence, tokenizer: Any) -> list[str]:
    return [tokenizer.decode([token]) for token in side.tokens[side.score_start :].tolist()]


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
    ids=["strings", "messages", "system", "turns", "plain", "no end of turn"],
)
def test_the_answer_and_one_end(template: str | None, pair: Pair, prompt: str, end: str) -> None:
    found = encoder(template).encode(pair)
    for side, answer in ((found.chosen, "Because."), (found.rejected, "No")):
        assert (read(side), scored(side)) == (prompt, answer + end)
        assert side.tokens.tolist() == ids(prompt) + ids(answer) + ids(end)
        assert side.num_scored == len(ids(answer)) + 1


def test_an_end_of_turn_of_the_models_own_needs_no_eos() -> None:
    """Generation configs name end-of-turn tokens that the tokenizer does not call special."""
    tokenizer = tiny_tokenizer("{% for m in messages %}{{ m.content }}!\n{% endfor %}")
    tokenizer.add_eos_token(str(ids("!")[0]))
    found = Encoder(tokenizer, DataConfig()).encode(CHATS)
    assert (scored(found.chosen), scored(found.rejected)) == ("Because.!", "No!")


def test_white_space_that_ends_an_answer_is_its_own() -> None:
    found = encoder(BARE).encode(Pair("Why?", "Because \n", "No\n\n"))
    assert scored(found.chosen).lstrip() == "Because \n\n</s>"
    assert scored(found.rejected).lstrip() == "No\n\n\n</s>"


def test_plain_text_that_ends_in_eos_gets_no_second_one() -> None:
    found = encoder(None).encode(Pair("Why?", "Because</s>", "No"))
    assert (scored(found.chosen), scored(found.rejected)) == ("Because</s>", "No</s>")


def test_every_turn_after_the_prompt_is_scored() -> None:
    found = encoder().encode(Pair([Q], [B, {"role": "tool", "content": "blue"}, A], [B]))
    turns = ["No<|im_end|>\n", "tool\nblue<|im_end|>\n", "assistant\nBecause.<|im_end|>"]
    assert scored(found.chosen) == "<|im_start|>".join(turns)
    assert (read(found.chosen), scored(found.rejected)) == (ASKED, "No<|im_end|>")


def test_tools_are_part_of_the_prompt() -> None:
    template = "{{ tools[0].function.name if tools }}\n" + BARE
    tools = [{"type": "function", "function": {"name": "sky"}}]
    found = encoder(template).encode(Pair([Q], [A], [B], tools=tools))
    assert read(found.rejected).startswith("sky\nuser: Why?")


# Template (or SmolLM2 with data.chat_template), prompt, answers, the tokens scored before the end,
# and how many of them begin in the prompt.
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
def test_where_the_tokenizer_merges_prompt_and_answer(smollm2_folder: Path, row: tuple) -> None:
    template, prompt, a, b, one, two, moved = row
    coder = encoder(template)
    if template in ("auto", "none"):
        tokenizer = load_only_tokenizer(str(smollm2_folder))
        coder = Encoder(tokenizer, DataConfig(chat_template=template))
    found = coder.encode(Pair(prompt, a, b))
    assert pieces(found.chosen, coder.tokenizer)[:-1] == one
    assert pieces(found.rejected, coder.tokenizer)[:-1] == two
    assert (found.chosen.tokens[-1], found.rejected.tokens[-1]) == (coder.eos, coder.eos)
    assert found.boundary_tokens == moved


TEXT = st.text(st.sampled_from("ab the.\n é🙂空1"), max_size=12)
ANSWER = TEXT.filter(str.strip)
ANSWERS = st.tuples(ANSWER, ANSWER).filter(lambda two: two[0].lstrip() != two[1].lstrip())


@given(TEXT, TEXT, ANSWERS)
@settings(deadline=None, max_examples=80)
def test_the_prompt_has_no_say_in_what_is_scored(first: str, prompt: str, answers: tuple) -> None:
    """Behind a header that nothing merges with, an answer is its own tokens, whatever the rest."""
    a, b = (answer.lstrip() for answer in answers)
    found = encoder().encode(Pair([user(first), A, user(prompt)], [assistant(a)], [assistant(b)]))
    for side, answer in ((found.chosen, a), (found.rejected, b)):
        assert side.tokens[side.score_start :].tolist() == ids(f"{answer}<|im_end|>")


@given(st.sampled_from([CHATML, INST, BARE, None]), TEXT, ANSWERS)
@settings(deadline=None, max_examples=120)
def test_what_is_read_and_what_is_scored(template: str | None, prompt: str, answers: tuple) -> None:
    coder = encoder(template, bos="<s>", adds_bos=True)
    found, asked = coder.encode(Pair(prompt, *answers)), coder.prompt_tokens(prompt)
    start = found.chosen.score_start
    firsts = set(asked[start : start + 1])
    end = {CHATML: "<|im_end|>", INST: "</s>", BARE: "\n</s>", None: "</s>"}[template]
    for side, answer in zip((found.chosen, found.rejected), answers, strict=True):
        assert side.tokens[: side.score_start].tolist() == asked[:start]
        whole = TINY.decode(asked) + " " * (template == INST) + answer + end
        assert read(side) + scored(side) == whole
        assert scored(side).endswith(answer + end)  # all of it, whatever it begins with
        firsts.add(int(side.tokens[side.score_start]))
    assert found.boundary_tokens == len(asked) - start
    assert not found.boundary_tokens or len(firsts) > 1  # not earlier than where the three part


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
    coder = encoder(template, bos="<s>", adds_bos=adds_bos)
    found = coder.encode(Pair(prompt, "Because.", "No"))
    for tokens in (found.chosen.tokens, found.rejected.tokens, coder.prompt_tokens(prompt)):
        assert list(tokens).count(ids("<s>")[0]) == count


def cut(sizes: tuple[int, int, int], limits: tuple[int, int], **options: Any) -> EncodedPair:
    """A plain pair of so many tokens (EOS comes on top), with (max_length, max_prompt_length)."""
    config = {"max_length": limits[0], "max_prompt_length": limits[1]}
    words = zip((" is", " sky", " sky"), (" the", " dog", " fox"), sizes, strict=True)
    texts = [first + others * (size - 1) for first, others, size in words]
    return encoder(None, config, **options).encode(Pair(*texts))


@pytest.mark.parametrize(
    ("sizes", "limits", "kept", "lost"),
    [
        ((8, 3, 4), (13, 4), (8, 4, 5), (0, 0)),
        ((8, 3, 4), (12, 4), (7, 4, 5), (1, 0)),
        ((8, 3, 4), (8, 4), (4, 4, 4), (4, 1)),
        ((8, 9, 2), (12, 4), (4, 8, 3), (4, 2)),  # the shorter answer stays whole
        ((3, 20, 2), (12, 8), (3, 9, 3), (0, 12)),  # a short prompt leaves its room to the answer
    ],
)
def test_what_is_cut(sizes: tuple, limits: tuple, kept: tuple, lost: tuple) -> None:
    found = cut(sizes, limits)
    assert (found.chosen.score_start, found.chosen.num_scored, found.rejected.num_scored) == kept
    assert (found.cut_prompt, found.cut_response) == lost


@given(st.tuples(*[st.integers(2, 20)] * 3), st.integers(1, 20), st.integers(1, 20), st.booleans())
@settings(deadline=None, max_examples=120)
def test_the_rule_of_truncation(sizes: tuple, max_prompt: int, more: int, bos: bool) -> None:
    """In closed form: the prompt gives way down to max_prompt, the answers have the rest."""
    limits = (max_prompt + more, max_prompt)
    options: dict[str, Any] = {"bos": "<s>", "adds_bos": True} if bos else {}
    whole = cut(sizes, (1000, 999), **options)
    before = whole.chosen.tokens.tolist()[: whole.chosen.score_start]
    answers = [s.tokens.tolist()[s.score_start :] for s in (whole.chosen, whole.rejected)]
    keep = min(len(before), max(max_prompt, limits[0] - max(map(len, answers))))
    head = before[:1] + before[len(before) - keep + 1 :] if bos else before[-keep:]
    tails = [answer[: limits[0] - keep] for answer in answers]
    if tails[0] == tails[1]:
        with pytest.raises(InvalidRecordError, match="identical responses"):
            cut(sizes, limits, **options)
        return
    found = cut(sizes, limits, **options)
    assert [s.tokens.tolist() for s in (found.chosen, found.rejected)] == [head + t for t in tails]
    assert (found.chosen.score_start, found.rejected.score_start) == (keep, keep)
    assert found.cut_prompt == len(before) - keep
    assert found.cut_response == sum(map(len, answers)) - sum(map(len, tails))


def test_an_answer_of_which_nothing_is_scored() -> None:
    silent = "q</s>{{ messages[1].content if messages[1] and messages[1].content != 'x' }}"
    with pytest.raises(InvalidRecordError, match="no scored tokens left"):
        encoder(silent).encode(Pair("q", "x", "b"))


def test_a_conversation_without_a_template_stops_the_run() -> None:
    with pytest.raises(SimPOError, match=r"f:9 is a conversation.*data\.chat_template"):
        encode_pairs(encoder(None), [STRINGS, Pair([Q], [A], [B], 0, "f:9")])


def test_encode_pairs_keeps_order_and_tells_what_is_refused() -> None:
    steps: list[None] = []
    pairs = [Pair([turn, Q], [A], [B], i, f"f:{i}") for i, turn in enumerate([Q, system("s"), Q])]
    found, refused = encode_pairs(encoder(INST, bos="<s>"), pairs, lambda: steps.append(None))
    assert [(p.index, p.source) for p in found] == [(0, "f:0"), (2, "f:2")]
    assert [(q.source, q.reason) for q in refused] == [("f:1", "rejected by the chat template")]
    assert len(steps) == 3
