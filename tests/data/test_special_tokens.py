"""Exactly one BOS, and one token that ends the turn, whatever a template writes."""

import pytest
from helpers.tiny import tiny_tokenizer
from tokenizers import AddedToken

from mlx_simpo.data.special_tokens import SpecialTokens

TINY = tiny_tokenizer()
NAMES = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
BOS, EOS, START, END = (TINY.convert_tokens_to_ids(name) for name in NAMES)
A, B, SPACE, NEWLINE = (TINY.encode(text, add_special_tokens=False)[0] for text in "ab \n")


def special(*, bos: str | None = "<s>", adds_bos: bool = True, eos: bool = True) -> SpecialTokens:
    """Those of a tokenizer that ends plain text with </s>."""
    tokenizer = tiny_tokenizer(None, bos=bos, adds_bos=adds_bos)
    if not eos:
        tokenizer._tokenizer.eos_token = None
    return SpecialTokens(tokenizer)


def test_the_three_sources_of_tokens_that_end_a_turn() -> None:
    tokenizer = tiny_tokenizer(None)  # whose only named token is </s>
    named = set(tokenizer.all_special_ids)
    assert named == {EOS}
    tokenizer._tokenizer.add_tokens([AddedToken("<tool>", special=False)])  # an ordinary word
    tokenizer.add_eos_token("a")  # as generation configs do
    # The others are marked as special in tokenizer.json alone.
    assert SpecialTokens(tokenizer).ends == {BOS, EOS, START, END, A}
    tokenizer._tokenizer.pad_token = "b"  # named, but no added token
    assert SpecialTokens(tokenizer).ends == {BOS, EOS, START, END, A, B}


@pytest.mark.parametrize(
    ("bos", "adds_bos", "expected"),
    [("<s>", True, [BOS]), ("<s>", False, []), (None, False, []), ("<|im_start|>", True, [START])],
)
def test_bos_is_what_the_tokenizer_adds(bos: str | None, adds_bos: bool, expected: list) -> None:
    assert special(bos=bos, adds_bos=adds_bos).bos == expected


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([], [BOS]),
        ([A, B], [BOS, A, B]),
        ([BOS], [BOS]),
        ([BOS, A], [BOS, A]),
        ([BOS, BOS, A], [BOS, BOS, A]),  # as the template wrote it
        ([NEWLINE, BOS, A], [NEWLINE, BOS, A]),
        ([NEWLINE, SPACE, BOS], [NEWLINE, SPACE, BOS]),
        ([NEWLINE, A], [BOS, NEWLINE, A]),
        ([NEWLINE, A, BOS], [BOS, NEWLINE, A, BOS]),
        ([A, BOS], [BOS, A, BOS]),
        ([SPACE, NEWLINE], [BOS, SPACE, NEWLINE]),
        ([START, A], [BOS, START, A]),
    ],
)
def test_there_is_one_bos(tokens: list[int], expected: list[int]) -> None:
    assert special().with_bos(tokens) == expected
    assert special(adds_bos=False).with_bos(tokens) == tokens


@pytest.mark.parametrize(
    ("tokens", "with_eos", "ended"),
    [
        ([], [EOS], [EOS]),
        ([A], [A, EOS], [A, EOS]),
        *((ended, ended, ended) for ended in ([EOS], [A, EOS], [A, B, EOS])),
        ([A, EOS, NEWLINE], [A, EOS, NEWLINE, EOS], [A, EOS]),
        ([A, END, NEWLINE, SPACE], [A, END, NEWLINE, SPACE, EOS], [A, END]),
        ([A, END], [A, END, EOS], [A, END]),
        ([A, END, END], [A, END, END, EOS], [A, END, END]),
        ([A, NEWLINE], [A, NEWLINE, EOS], [A, NEWLINE, EOS]),  # it may be the response's own
        ([A, END, B], [A, END, B, EOS], [A, END, B, EOS]),
        ([NEWLINE], [NEWLINE, EOS], [NEWLINE, EOS]),
        ([END, NEWLINE], [END, NEWLINE, EOS], [END]),
    ],
)
def test_one_token_ends_the_turn(tokens: list[int], with_eos: list, ended: list) -> None:
    assert special().with_eos(tokens) == with_eos
    assert special().end_turn(tokens) == ended
    without = special(eos=False)
    assert without.eos is None
    assert without.with_eos(tokens) == tokens
    assert without.end_turn([A, NEWLINE]) == [A, NEWLINE]


def test_white_space_may_end_a_turn() -> None:
    tokenizer = tiny_tokenizer(None)
    tokenizer.add_eos_token(str(NEWLINE))
    assert SpecialTokens(tokenizer).end_turn([A, NEWLINE, SPACE]) == [A, NEWLINE]


@pytest.mark.parametrize(
    ("response", "is_empty"),
    [
        ([END], True),
        ([NEWLINE, END], True),
        ([SPACE] * 3 + [EOS], True),
        ([SPACE] * 4 + [EOS], False),  # too long to be looked at
        ([A, END], False),
        ([END, A], False),
        ([SPACE], True),
        ([], False),  # "no scored tokens left" says it
    ],
)
def test_responses_that_say_nothing(response: list[int], is_empty: bool) -> None:
    assert special().is_empty(response) == is_empty
