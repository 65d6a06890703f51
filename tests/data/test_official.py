"""compat: official restated from the authors' code: run_simpo.py (apply_chat_template) and
simpo_trainer.py (build_tokenized_answer, tokenize_row with truncation_mode keep_end)."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import BARE, CHATML, INST, assistant, system, tiny_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo import DataConfig, SimPOError
from mlx_simpo.data.encode import EncodedPair, Encoder, TokenizedSequence
from mlx_simpo.data.records import InvalidRecordError, Pair
from mlx_simpo.model.loading import load_only_tokenizer

TINY = tiny_tokenizer(bos="<s>")
Q, A, B = user("Why?"), assistant("Because."), assistant("No")
STRINGS = Pair("Why?", "Because.", "No")
EMPTY_SYSTEM = "<|im_start|>system\n<|im_end|>\n"
ASKED = "<|im_start|>user\nWhy?<|im_end|>\n"
ANSWERED = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"


def encoder(template: str | None = CHATML, bos: str | None = "<s>", **config: Any) -> Encoder:
    return Encoder(tiny_tokenizer(template, bos=bos), DataConfig(compat="official", **config))


def ids(text: str) -> list[int]:
    return TINY.encode(text, add_special_tokens=False)


def halves(side: TokenizedSequence) -> tuple[str, str]:
    """What is read and what is scored."""
    tokens = side.tokens.tolist()
    return TINY.decode(tokens[: side.score_start]), TINY.decode(tokens[side.score_start :])


def restated(
    tokenizer: Any, texts: tuple[str, str, str], max_length: int, max_prompt_length: int
) -> list[tuple[list[int], list[int]]] | None:
    """(prompt tokens, answer tokens) of chosen and rejected as tokenize_row leaves them, or None
    where it raises."""
    prompt, *answers = texts
    plain = tokenizer.encode(prompt, add_special_tokens=False)
    rows = []
    for answer in answers:
        full = tokenizer.encode(prompt + answer, add_special_tokens=False)
        if len(full) != len(plain + full[len(plain) :]):
            return None
        start = len(plain) - (plain != full[: len(plain)])
        rows.append({"prompt": full[:start], "answer": full[start:]})
    one, two = (row["prompt"] for row in rows)
    if sum(a != b for a, b in zip(one, two, strict=False)) > 1 or abs(len(one) - len(two)) > 1:
        return None
    for row in rows:
        if not row["prompt"] or row["prompt"][0] != tokenizer.bos_token_id:
            row["prompt"].insert(0, tokenizer.bos_token_id)
        if not row["answer"] or row["answer"][-1] != tokenizer.eos_token_id:
            row["answer"].append(tokenizer.eos_token_id)
    longer = max(len(row["answer"]) for row in rows)
    for row in rows:
        if len(row["prompt"]) + longer > max_length:
            row["prompt"] = row["prompt"][-max_prompt_length:]
    for row in rows:
        if len(row["prompt"]) + longer > max_length:
            row["answer"] = row["answer"][: max_length - max_prompt_length]
    return [(row["prompt"], row["answer"]) for row in rows]


def as_rows(found: EncodedPair) -> list[tuple[list[int], list[int]]]:
    sides = (found.chosen, found.rejected)
    return [(s.tokens.tolist()[: s.score_start], s.tokens.tolist()[s.score_start :]) for s in sides]


@pytest.mark.parametrize("pair", [STRINGS, Pair([Q], [A], [B]), Pair([Q], [A], [B], whole=True)])
def test_header_and_default_system_turn_are_scored(pair: Pair) -> None:
    found = encoder().encode(pair)
    prompt = f"<s>{EMPTY_SYSTEM}{ASKED}"
    for side, answer in ((found.chosen, "Because."), (found.rejected, "No")):
        # EOS also behind an end-of-turn token, because a newline follows that.
        assert halves(side) == (prompt, ANSWERED.format(answer) + "<|im_end|>")
        assert side.tokens.tolist() == ids(prompt) + ids(ANSWERED.format(answer) + "<|im_end|>")


@pytest.mark.parametrize(
    ("template", "read", "scored"),
    [
        # A BOS text at the start of an answer is taken off; a final EOS is not doubled.
        (INST, "<s>[INST] Why? [/INST]", " Because.</s>"),
        # No "system" in the template, no system message.
        (BARE, "<s>user: Why?\n", "assistant: Because.\n</s>"),
        (BARE + "{# system #}", "<s>system: \nuser: Why?\n", "assistant: Because.\n</s>"),
    ],
)
def test_other_templates(template: str, read: str, scored: str) -> None:
    for coder in (encoder(template), encoder(INST, chat_template=template)):
        assert halves(coder.encode(STRINGS).chosen) == (read, scored)


def test_a_system_turn_of_the_record_stays_alone() -> None:
    found = encoder().encode(Pair([system("s"), Q], [A], [B]))
    assert halves(found.chosen)[0] == f"<s><|im_start|>system\ns<|im_end|>\n{ASKED}"
    assert "Be kind." in halves(found.chosen)[1]


def test_the_system_turn_is_put_into_a_copy() -> None:
    pair = Pair([Q], [A], [B])
    encoder().encode(pair)
    assert pair == Pair([Q], [A], [B])


def test_all_but_the_last_turn_of_whole_conversations_is_the_prompt() -> None:
    pair = Pair([Q], [B, Q, A], [A, Q, B], whole=True)
    prompt = f"<s>{EMPTY_SYSTEM}{ASKED}<|im_start|>assistant\nNo<|im_end|>\n{ASKED}"
    found = encoder().encode(pair)
    assert halves(found.chosen) == (prompt, ANSWERED.format("Because.") + "<|im_end|>")
    # The rejected conversation's own middle turns are lost: the chosen one's are its prompt.
    assert halves(found.rejected) == (prompt, ANSWERED.format("No") + "<|im_end|>")


def test_with_an_explicit_prompt_every_later_turn_is_scored() -> None:
    found = encoder(BARE).encode(Pair([Q], [B, Q, A], [B]))
    answer = "assistant: No\nuser: Why?\nassistant: Because.\n</s>"
    assert halves(found.chosen) == ("<s>user: Why?\n", answer)


def test_bos_that_begins_every_turn() -> None:
    """SmolLM2's BOS is <|im_start|>: it is taken off the answer and not doubled in the prompt."""
    found = encoder(bos="<|im_start|>").encode(STRINGS)
    scored = ANSWERED.format("Because.").removeprefix("<|im_start|>") + "<|im_end|>"
    assert halves(found.chosen) == (EMPTY_SYSTEM + ASKED, scored)


def test_smollm2(smollm2_folder: Path) -> None:
    tokenizer = load_only_tokenizer(str(smollm2_folder))
    own = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    chosen, rejected = (
        f"system\n{own}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n"
        for answer in ("Because.", "No")
    )
    found = Encoder(tokenizer, DataConfig(compat="official")).encode(STRINGS)
    expected = restated(tokenizer, (EMPTY_SYSTEM + ASKED, chosen, rejected), 1024, 512)
    assert as_rows(found) == expected


# The prompt's end merges with the answers' beginning where a template writes nothing between.
JOINED = "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("prompt", "a", "b", "one", "two", "moved"),
    [
        ("the ", "and", "b", ("<s>the", " and</s>"), ("<s>the", " b</s>"), 1),
        ("the ", " a", " b", ("<s>the ", " a</s>"), ("<s>the ", " b</s>"), 0),
        ("the a", "nd", "!", ("<s>the", " and</s>"), ("<s>the a", "!</s>"), 1),
    ],
)
def test_the_boundary_goes_one_token_back(
    prompt: str, a: str, b: str, one: tuple, two: tuple, moved: int
) -> None:
    found = encoder(JOINED).encode(Pair(prompt, a, b))
    assert (halves(found.chosen), halves(found.rejected)) == (one, two)
    assert found.boundary_tokens == moved


TEXT = st.text(st.sampled_from("ab the.\n é空1"), min_size=1, max_size=20).filter(str.strip)


@given(st.sampled_from([CHATML, BARE, JOINED]), TEXT, TEXT, TEXT, st.integers(1, 60), st.data())
@settings(deadline=None, max_examples=150)
def test_token_for_token(
    template: str, prompt: str, a: str, b: str, max_prompt: int, data: st.DataObject
) -> None:
    max_length = max_prompt + data.draw(st.integers(1, 60))
    if template == CHATML:
        asked = f"{EMPTY_SYSTEM}<|im_start|>user\n{prompt}<|im_end|>\n"
        texts = (asked, ANSWERED.format(a), ANSWERED.format(b))
    elif template == BARE:
        texts = (f"user: {prompt}\n", f"assistant: {a}\n", f"assistant: {b}\n")
    else:
        texts = (prompt, a, b)
    coder = encoder(template, max_length=max_length, max_prompt_length=max_prompt)
    expected = restated(coder.tokenizer, texts, max_length, max_prompt)
    if expected is None or expected[0] == expected[1]:
        with pytest.raises(InvalidRecordError):
            coder.encode(Pair(prompt, a, b))
        return
    found = coder.encode(Pair(prompt, a, b))
    assert as_rows(found) == expected
    whole = restated(coder.tokenizer, texts, 10**6, 10**6)
    assert whole is not None
    lost = [
        [len(a) - len(b) for a, b in zip(*rows, strict=True)]
        for rows in zip(whole, expected, strict=True)
    ]
    assert found.cut_prompt == max(lost[0][0], lost[1][0])
    assert found.cut_response == lost[0][1] + lost[1][1]


def test_a_short_prompt_gives_no_room_to_the_answer() -> None:
    """1024/512 with a short prompt keeps 512 tokens of the answer, and no EOS."""
    coder = encoder(BARE, max_length=40, max_prompt_length=25)
    found = coder.encode(Pair("q", "the " * 40, "No"))
    assert halves(found.chosen)[0] == "<s>user: q\n"
    assert found.chosen.num_scored == 40 - 25
    assert (found.cut_prompt, found.rejected.tokens[-1]) == (0, coder.eos)
    assert found.chosen.tokens[-1] != coder.eos


def test_a_cut_prompt_loses_bos() -> None:
    found = encoder(BARE, max_length=20, max_prompt_length=4).encode(Pair("the " * 9, "a", "b"))
    assert (found.chosen.score_start, found.cut_prompt) == (
        4,
        len(ids("<s>user: " + "the " * 9 + "\n")) - 4,
    )
    assert not halves(found.chosen)[0].startswith("<s>")


def test_an_answer_that_merges_into_fewer_tokens_than_its_prompt() -> None:
    with pytest.raises(InvalidRecordError, match="fails the official code's check"):
        encoder(JOINED).encode(Pair("number", "s", "x"))


@pytest.mark.parametrize(
    ("template", "bos", "lacking"), [(None, "<s>", "chat template"), (CHATML, None, "BOS token")]
)
def test_what_the_official_code_needs(template: str | None, bos: str | None, lacking: str) -> None:
    with pytest.raises(SimPOError, match=rf"data\.compat.*no {lacking}"):
        encoder(template, bos)


def test_the_official_code_needs_eos() -> None:
    tokenizer = tiny_tokenizer(bos="<s>")
    tokenizer._tokenizer.eos_token = None
    with pytest.raises(SimPOError, match=r"data\.compat.*no EOS"):
        Encoder(tokenizer, DataConfig(compat="official")).encode(STRINGS)


def test_half_a_surrogate_pair_is_refused() -> None:
    with pytest.raises(InvalidRecordError):
        encoder().encode(Pair("q", "\ud800", "b"))
