"""compat: official restated from the authors' code: run_simpo.py (apply_chat_template) and
simpo_trainer.py (build_tokenized_answer, tokenize_row with truncation_mode keep_end)."""

from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import BARE, CHATML, INST, assistant, system, tiny_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo import DataConfig, SimPOError
from mlx_simpo.data.dropped import Dropped
from mlx_simpo.data.encode import EncodedPair, Encoder, TokenizedSequence
from mlx_simpo.data.records import Pair
from mlx_simpo.data.rows import InvalidRecordError
from mlx_simpo.model.loading import load_only_tokenizer

TINY = tiny_tokenizer(bos="<s>")
Q, A, B = user("Why?"), assistant("Because."), assistant("No")
STRINGS = Pair("Why?", "Because.", "No")
EMPTY_SYSTEM = "<|im_start|>system\n<|im_end|>\n"
ASKED = "<|im_start|>user\nWhy?<|im_end|>\n"
RESPONDED = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"


def make_encoder(template: str | None = CHATML, bos: str | None = "<s>", **config: Any) -> Encoder:
    return Encoder(tiny_tokenizer(template, bos=bos), DataConfig(compat="official", **config))


def ids(text: str) -> list[int]:
    return TINY.encode(text, add_special_tokens=False)


def halves(sequence: TokenizedSequence) -> tuple[str, str]:
    """(unscored text, scored text)."""
    tokens = sequence.tokens.tolist()
    start = sequence.score_start
    return TINY.decode(tokens[:start]), TINY.decode(tokens[start:])


def restated(
    tokenizer: Any, texts: tuple[str, str, str], max_length: int, max_prompt_length: int
) -> list[tuple[list[int], list[int]]] | None:
    """(prompt tokens, response tokens) of chosen and rejected as tokenize_row returns them, or None
    where it raises."""
    prompt, *responses = texts
    plain = tokenizer.encode(prompt, add_special_tokens=False)
    rows = []
    for response in responses:
        full = tokenizer.encode(prompt + response, add_special_tokens=False)
        if len(full) != len(plain + full[len(plain) :]):
            return None
        start = len(plain) - (plain != full[: len(plain)])
        rows.append({"prompt": full[:start], "response": full[start:]})
    one, two = (row["prompt"] for row in rows)
    if sum(a != b for a, b in zip(one, two, strict=False)) > 1 or abs(len(one) - len(two)) > 1:
        return None
    for row in rows:
        if not row["prompt"] or row["prompt"][0] != tokenizer.bos_token_id:
            row["prompt"].insert(0, tokenizer.bos_token_id)
        if not row["response"] or row["response"][-1] != tokenizer.eos_token_id:
            row["response"].append(tokenizer.eos_token_id)
    longer = max(len(row["response"]) for row in rows)
    for row in rows:
        if len(row["prompt"]) + longer > max_length:
            row["prompt"] = row["prompt"][-max_prompt_length:]
    for row in rows:
        if len(row["prompt"]) + longer > max_length:
            row["response"] = row["response"][: max_length - max_prompt_length]
    return [(row["prompt"], row["response"]) for row in rows]


def as_rows(pair: EncodedPair) -> list[tuple[list[int], list[int]]]:
    sequences = ((s.tokens.tolist(), s.score_start) for s in (pair.chosen, pair.rejected))
    return [(tokens[:start], tokens[start:]) for tokens, start in sequences]


@pytest.mark.parametrize(
    "pair", [STRINGS, Pair([Q], [A], [B]), Pair([Q], [A], [B], has_full_conversations=True)]
)
def test_header_and_default_system_turn_are_scored(pair: Pair) -> None:
    encoded = make_encoder().encode(pair)
    prompt = f"<s>{EMPTY_SYSTEM}{ASKED}"
    for sequence, response in ((encoded.chosen, "Because."), (encoded.rejected, "No")):
        # EOS also behind an end-of-turn token, because a newline follows that.
        assert halves(sequence) == (prompt, RESPONDED.format(response) + "<|im_end|>")
        assert sequence.tokens.tolist() == ids(prompt) + ids(
            RESPONDED.format(response) + "<|im_end|>"
        )


@pytest.mark.parametrize(
    ("template", "unscored", "response"),
    [
        # A BOS text at the start of a response is removed; a final EOS is not doubled.
        (INST, "<s>[INST] Why? [/INST]", " Because.</s>"),
        # No "system" in the template, no system message.
        (BARE, "<s>user: Why?\n", "assistant: Because.\n</s>"),
        (BARE + "{# system #}", "<s>system: \nuser: Why?\n", "assistant: Because.\n</s>"),
    ],
)
def test_other_templates(template: str, unscored: str, response: str) -> None:
    for encoder in (make_encoder(template), make_encoder(INST, chat_template=template)):
        assert halves(encoder.encode(STRINGS).chosen) == (unscored, response)


def test_no_empty_system_turn_beside_one_of_the_record() -> None:
    encoded = make_encoder().encode(Pair([system("s"), Q], [A], [B]))
    assert halves(encoded.chosen)[0] == f"<s><|im_start|>system\ns<|im_end|>\n{ASKED}"
    assert "Be kind." in halves(encoded.chosen)[1]


def test_what_the_template_drops_of_either_response() -> None:
    thinking = assistant("Because.", reasoning_content="Let me see.")
    for chosen, rejected in ((thinking, B), (B, thinking)):
        assert make_encoder().encode(Pair([Q], [chosen], [rejected])).dropped == Dropped.THINKING
    assert make_encoder().encode(Pair([Q, thinking, Q], [A], [B])).dropped == 0


def test_encoding_does_not_change_the_pair() -> None:
    pair = Pair([Q], [A], [B])
    make_encoder().encode(pair)
    assert pair == Pair([Q], [A], [B])


def test_the_prompt_of_full_conversations_is_all_but_the_last_turn() -> None:
    pair = Pair([Q], [B, Q, A], [A, Q, B], has_full_conversations=True)
    prompt = f"<s>{EMPTY_SYSTEM}{ASKED}<|im_start|>assistant\nNo<|im_end|>\n{ASKED}"
    encoded = make_encoder().encode(pair)
    assert halves(encoded.chosen) == (prompt, RESPONDED.format("Because.") + "<|im_end|>")
    # The rejected conversation loses its middle turns: its prompt has those of the chosen one.
    assert halves(encoded.rejected) == (prompt, RESPONDED.format("No") + "<|im_end|>")


def test_with_an_explicit_prompt_every_later_turn_is_scored() -> None:
    encoded = make_encoder(BARE).encode(Pair([Q], [B, Q, A], [B]))
    response = "assistant: No\nuser: Why?\nassistant: Because.\n</s>"
    assert halves(encoded.chosen) == ("<s>user: Why?\n", response)


def test_a_bos_that_starts_every_turn() -> None:
    """SmolLM2's BOS is <|im_start|>: removed from the response, not doubled in the prompt."""
    encoded = make_encoder(bos="<|im_start|>").encode(STRINGS)
    response = RESPONDED.format("Because.").removeprefix("<|im_start|>") + "<|im_end|>"
    assert halves(encoded.chosen) == (EMPTY_SYSTEM + ASKED, response)


def test_smollm2(smollm2_folder: Path) -> None:
    tokenizer = load_only_tokenizer(str(smollm2_folder))
    own = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    chosen, rejected = (
        f"system\n{own}<|im_end|>\n<|im_start|>assistant\n{response}<|im_end|>\n"
        for response in ("Because.", "No")
    )
    encoded = Encoder(tokenizer, DataConfig(compat="official")).encode(STRINGS)
    expected = restated(tokenizer, (EMPTY_SYSTEM + ASKED, chosen, rejected), 1024, 512)
    assert as_rows(encoded) == expected


# The end of the prompt merges with the start of a response if a template writes nothing between.
JOINED = "{{ messages[0].content }}"


@pytest.mark.parametrize(
    ("prompt", "a", "b", "chosen", "rejected", "boundary_tokens"),
    [
        ("the ", "and", "b", ("<s>the", " and</s>"), ("<s>the", " b</s>"), 1),
        ("the ", " a", " b", ("<s>the ", " a</s>"), ("<s>the ", " b</s>"), 0),
        ("the a", "nd", "!", ("<s>the", " and</s>"), ("<s>the a", "!</s>"), 1),
    ],
)
def test_the_boundary_moves_one_token_back(
    prompt: str, a: str, b: str, chosen: tuple, rejected: tuple, boundary_tokens: int
) -> None:
    encoded = make_encoder(JOINED).encode(Pair(prompt, a, b))
    assert (halves(encoded.chosen), halves(encoded.rejected)) == (chosen, rejected)
    assert encoded.boundary_tokens == boundary_tokens


TEXT = st.text(st.sampled_from("ab the.\n é空1"), min_size=1, max_size=20).filter(str.strip)


@given(st.sampled_from([CHATML, BARE, JOINED]), TEXT, TEXT, TEXT, st.integers(1, 60), st.data())
@settings(deadline=None, max_examples=150)
def test_tokens_equal_those_of_the_restated_code(
    template: str, prompt: str, a: str, b: str, max_prompt: int, data: st.DataObject
) -> None:
    max_length = max_prompt + data.draw(st.integers(1, 60))
    if template == CHATML:
        asked = f"{EMPTY_SYSTEM}<|im_start|>user\n{prompt}<|im_end|>\n"
        texts = (asked, RESPONDED.format(a), RESPONDED.format(b))
    elif template == BARE:
        texts = (f"user: {prompt}\n", f"assistant: {a}\n", f"assistant: {b}\n")
    else:
        texts = (prompt, a, b)
    encoder = make_encoder(template, max_length=max_length, max_prompt_length=max_prompt)
    expected = restated(encoder.tokenizer, texts, max_length, max_prompt)
    if expected is None or expected[0] == expected[1]:
        reasons = "fails the official code's check|identical responses"
        with pytest.raises(InvalidRecordError, match=reasons):
            encoder.encode(Pair(prompt, a, b))
        return
    encoded = encoder.encode(Pair(prompt, a, b))
    assert as_rows(encoded) == expected
    whole = restated(encoder.tokenizer, texts, 10**6, 10**6)
    assert whole is not None
    cuts = [
        [len(a) - len(b) for a, b in zip(*rows, strict=True)]
        for rows in zip(whole, expected, strict=True)
    ]
    assert encoded.cut_prompt == max(cuts[0][0], cuts[1][0])
    assert encoded.cut_response == cuts[0][1] + cuts[1][1]


def test_a_response_cannot_use_the_space_of_a_short_prompt() -> None:
    """With 1024/512 and a short prompt, 512 tokens of the response remain, without EOS."""
    encoder = make_encoder(BARE, max_length=40, max_prompt_length=25)
    encoded = encoder.encode(Pair("q", "the " * 40, "No"))
    assert halves(encoded.chosen)[0] == "<s>user: q\n"
    assert encoded.chosen.num_scored == 40 - 25
    assert (encoded.cut_prompt, encoded.rejected.tokens[-1]) == (0, encoder.special.eos)
    assert encoded.chosen.tokens[-1] != encoder.special.eos


def test_a_cut_prompt_loses_bos() -> None:
    encoded = make_encoder(BARE, max_length=20, max_prompt_length=4).encode(
        Pair("the " * 9, "a", "b")
    )
    num_prompt_tokens = len(ids("<s>user: " + "the " * 9 + "\n"))
    assert (encoded.chosen.score_start, encoded.cut_prompt) == (4, num_prompt_tokens - 4)
    assert not halves(encoded.chosen)[0].startswith("<s>")


def test_a_response_that_merges_into_fewer_tokens_than_its_prompt() -> None:
    with pytest.raises(InvalidRecordError, match="fails the official code's check"):
        make_encoder(JOINED).encode(Pair("number", "s", "x"))


@pytest.mark.parametrize(
    ("template", "bos", "missing"), [(None, "<s>", "chat template"), (CHATML, None, "BOS token")]
)
def test_what_the_official_code_needs(template: str | None, bos: str | None, missing: str) -> None:
    with pytest.raises(SimPOError, match=rf"data\.compat.*no {missing}, which the official code"):
        make_encoder(template, bos)


def test_the_official_code_needs_eos() -> None:
    tokenizer = tiny_tokenizer(bos="<s>")
    tokenizer._tokenizer.eos_token = None
    with pytest.raises(SimPOError, match=r"data\.compat.*no EOS"):
        Encoder(tokenizer, DataConfig(compat="official")).encode(STRINGS)


def test_half_a_surrogate_pair_is_rejected() -> None:
    with pytest.raises(InvalidRecordError, match="invalid Unicode text"):
        make_encoder().encode(Pair("q", "\ud800", "b"))
