"""What inspection counts is what is there, and what it marks is what is scored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.tiny import BARE, assistant, some_pairs, system, tiny_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.style import Style
from rich.text import Text

from mlx_simpo import DataConfig
from mlx_simpo.data.encode import EncodedPair, Encoder, TokenizedSequence, encode_pairs
from mlx_simpo.data.inspection import marked, show, summarize
from mlx_simpo.data.pairs import Quarantined
from mlx_simpo.data.records import Pair
from mlx_simpo.model.loading import load_only_tokenizer

TINY = tiny_tokenizer()
CODER = Encoder(TINY, DataConfig())
PAIRS = [Pair(**record, index=i) for i, record in enumerate(some_pairs(9))]


def summary(pairs: list[Pair], quarantined: tuple = (), **config: Any) -> dict[str, Any]:
    coder = Encoder(TINY, DataConfig(**config))
    encoded, refused = encode_pairs(coder, pairs)
    return summarize(encoded, [*quarantined, *refused], coder)


def sized(prompt: int, chosen: int, rejected: int, **counts: int) -> EncodedPair:
    sides = (
        TokenizedSequence(np.arange(prompt + n, dtype=np.int32), prompt) for n in (chosen, rejected)
    )
    return EncodedPair(*sides, **counts)


def test_tokens_are_counted_one_by_one() -> None:
    found = summary(PAIRS)
    chats = [
        TINY.apply_chat_template(
            [user(pair.prompt), assistant(answer)], tokenize=False
        ).removesuffix("\n")
        for pair in PAIRS
        for answer in (pair.chosen, pair.rejected)
    ]
    answers = [f"{text}<|im_end|>" for pair in PAIRS for text in (pair.chosen, pair.rejected)]
    assert found["pairs"] == found["records"] == 9
    assert found["tokens"] == sum(len(TINY.encode(text)) for text in chats)
    assert found["scored_tokens"] == sum(len(TINY.encode(text)) for text in answers)
    assert found["prompts_cut"] == found["responses_cut"] == found["tokens_cut"] == 0
    assert found["boundary_merges"] == 0


def test_what_is_left_out_is_counted_and_listed() -> None:
    unusable = (
        Quarantined("f:1", "empty response", "chosen"),
        Quarantined("f:4", "identical responses"),
        Quarantined("f:7", "empty response", "rejected"),
    )
    found = summary(PAIRS, unusable)
    assert (found["records"], found["pairs"]) == (12, 9)
    assert list(found["quarantined"].items()) == [("empty response", 2), ("identical responses", 1)]
    assert found["quarantined_records"][0] == {
        "source": "f:1",
        "reason": "empty response",
        "detail": "chosen",
    }
    assert [record["source"] for record in found["quarantined_records"]] == ["f:1", "f:4", "f:7"]


def test_what_the_template_refuses_is_left_out() -> None:
    strict = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + BARE
    refused = Pair([system("s"), user("q")], [assistant("a")], [assistant("b")], 9, "f:10")
    found = summary([*PAIRS, refused], chat_template=strict)
    assert (found["records"], found["pairs"]) == (10, 9)
    assert found["quarantined"] == {"rejected by the chat template": 1}
    assert found["quarantined_records"][0]["source"] == "f:10"


@pytest.mark.parametrize(
    ("template", "origin"),
    [("auto", "the tokenizer's own"), ("none", "plain text"), (BARE, "data.chat_template")],
)
def test_the_template_is_named(template: str, origin: str) -> None:
    assert origin in summary(PAIRS, chat_template=template)["chat_template"]


def test_moved_boundaries_are_counted() -> None:
    merging = [Pair("the ", "and", "b"), Pair("the", " and", " b"), Pair("the a", "nd", "b")]
    assert summary(merging, chat_template="none")["boundary_merges"] == 2


def test_cuts_are_counted_by_pair_and_by_token() -> None:
    pairs = [
        sized(5, 5, 5),
        sized(5, 5, 5, cut_prompt=3),
        sized(5, 5, 5, cut_response=4),
        sized(5, 5, 5, cut_prompt=10, cut_response=20),
    ]
    found = summarize(pairs, [], CODER)
    assert (found["prompts_cut"], found["responses_cut"], found["tokens_cut"]) == (2, 2, 37)


def test_cuts_are_what_the_limits_take_away() -> None:
    """Plain text of " the the …": what is missing of the uncut tokens, the prompt counted once."""
    long = [Pair(" the" * 30, " sky" * 6, " sea" * 4), Pair(" the", " sky" * 3, " sea" * 3)]
    whole = summary(long, chat_template="none")
    cut = summary(long, chat_template="none", max_length=12, max_prompt_length=8)
    assert (cut["prompts_cut"], cut["responses_cut"]) == (1, 1)
    assert (whole["tokens"] - cut["tokens"]) == 2 * 22 + (cut["tokens_cut"] - 22)


def test_length_quantiles() -> None:
    pairs = [sized(1 + n, 11 + n, 31 - n) for n in range(11)]
    lengths = summarize(pairs, [], CODER)["lengths"]
    assert lengths["prompt"] == {
        "min": 1,
        "10 %": 2,
        "median": 6,
        "90 %": 10,
        "99 %": 10,
        "max": 11,
    }
    assert (lengths["chosen"]["min"], lengths["chosen"]["max"]) == (11, 21)
    assert (lengths["rejected"]["min"], lengths["rejected"]["max"]) == (21, 31)
    assert set(lengths["longer sequence"].values()) == {32}


SIZE = st.integers(1, 60)


@given(st.lists(st.builds(sized, SIZE, SIZE, SIZE), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_quantiles_are_lengths_in_order(pairs: list[EncodedPair]) -> None:
    lengths = summarize(pairs, [], CODER)["lengths"]
    longer = [max(len(p.chosen.tokens), len(p.rejected.tokens)) for p in pairs]
    assert lengths["longer sequence"]["min"] == min(longer)
    assert lengths["longer sequence"]["max"] == max(longer)
    for quantiles in lengths.values():
        assert list(quantiles.values()) == sorted(quantiles.values())


def test_a_summary_is_json() -> None:
    found = summary(PAIRS, (Quarantined("f:1", "empty response"),))
    assert json.loads(json.dumps(found)) == found


def halves(text: Text) -> tuple[str, str]:
    """What stands before the brackets and in them."""
    before, _, rest = text.plain.partition("⟦")
    inside, bracket, after = rest.partition("⟧")
    assert (bracket, after) == ("⟧", "")
    return before, inside


def test_marked_without_colour() -> None:
    found = CODER.encode(Pair("Why?", "The sky\nis", "No"))
    read, scored = halves(marked(found.chosen, TINY, "green"))
    assert read == (
        "<|im_start|>system↵\nBe kind.<|im_end|>↵\n<|im_start|>user↵\nWhy?<|im_end|>↵\n"
        "<|im_start|>assistant↵\n"
    )
    assert scored == "The| sky|↵\n|is|<|im_end|>|"


TEXT = st.text(st.sampled_from("ab the.\n1"), max_size=12)


@given(TEXT, TEXT.filter(str.strip))
@settings(deadline=None, max_examples=60)
def test_every_scored_token_ends_in_a_bar(prompt: str, answer: str) -> None:
    side = CODER.encode(Pair(prompt, answer, "other")).chosen
    _, scored = halves(marked(side, TINY, "green"))
    assert scored.count("|") == side.num_scored + "<|im_end|>".count("|")
    tokens = scored.replace("<|im_end|>", "END").split("|")[:-1]
    assert "".join(tokens).replace("↵", "") == f"{answer}END"


def painted() -> list[tuple[str, Style]]:
    """The scored tokens of "The sky is" as they reach a terminal."""
    text = marked(CODER.encode(Pair("Why?", "The sky is", "No")).chosen, TINY, "green")
    segments = list(text.render(Console(force_terminal=True)))
    first = [segment.text for segment in segments].index("⟦") + 1
    return [(s.text, s.style or Style()) for s in segments[first:-1] if s.text != "|"]


def test_neighbouring_tokens_are_told_apart_by_colour_and_line() -> None:
    assert [text for text, _ in painted()] == ["The", " sky", " is", "<|im_end|>"]
    assert all(style.color and style.color.name == "green" for _, style in painted())
    assert [bool(style.underline) for _, style in painted()] == [False, True, False, True]


def test_only_what_is_read_is_dim() -> None:
    assert not any(style.dim for _, style in painted())


def test_smollm2(smollm2_folder: Path) -> None:
    tokenizer = load_only_tokenizer(str(smollm2_folder))
    found = Encoder(tokenizer, DataConfig()).encode(Pair("Why?", "\n Because.", "No"))
    read, scored = halves(marked(found.chosen, tokenizer, "green"))
    assert read.endswith("<|im_end|>↵\n<|im_start|>assistant")
    assert scored == "↵\n↵\n| Because|.|<|im_end|>|"


def test_show_keeps_newlines_and_makes_them_visible() -> None:
    assert show(TINY, TINY.encode("a\n\nb")) == "a↵\n↵\nb"
