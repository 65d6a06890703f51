"""Inspection counts what the dataset holds and marks the tokens that are scored."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from helpers.tiny import BARE, assistant, some_pairs, system, tiny_tokenizer, user
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.style import Style
from rich.text import Text
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_simpo import DataConfig
from mlx_simpo.data.dropped import Dropped
from mlx_simpo.data.encode import EncodedPair, Encoder, TokenizedSequence, encode_pairs
from mlx_simpo.data.inspection import Pieces, length_bias, marked, show, summarize
from mlx_simpo.data.pairs import Quarantined
from mlx_simpo.data.records import Pair
from mlx_simpo.model.loading import load_only_tokenizer

TINY = tiny_tokenizer()
ENCODER = Encoder(TINY, DataConfig())
PAIRS = [Pair(**record, index=i) for i, record in enumerate(some_pairs(9))]


def summary(pairs: list[Pair], quarantined: tuple = (), **config: Any) -> dict[str, Any]:
    encoder = Encoder(TINY, DataConfig(**config))
    encoded, rejected = encode_pairs(encoder, pairs)
    return summarize(encoded, [*quarantined, *rejected], encoder)


def pair_of(prompt: int, chosen: int, rejected: int, **counts: Any) -> EncodedPair:
    first, second = (
        TokenizedSequence(np.arange(prompt + n, dtype=np.int32), prompt) for n in (chosen, rejected)
    )
    return EncodedPair(first, second, **counts)


def test_token_counts_are_those_of_the_whole_texts() -> None:
    result = summary(PAIRS)
    chats = [
        TINY.apply_chat_template(
            [user(pair.prompt), assistant(response)], tokenize=False
        ).removesuffix("\n")
        for pair in PAIRS
        for response in (pair.chosen, pair.rejected)
    ]
    responses = [f"{text}<|im_end|>" for pair in PAIRS for text in (pair.chosen, pair.rejected)]
    assert result["pairs"] == result["records"] == 9
    assert result["tokens"] == sum(len(TINY.encode(text)) for text in chats)
    assert result["scored_tokens"] == sum(len(TINY.encode(text)) for text in responses)
    assert result["prompts_cut"] == result["responses_cut"] == result["tokens_cut"] == 0
    assert result["boundary_merges"] == 0


def test_quarantined_records_are_counted_and_listed() -> None:
    quarantined = (
        Quarantined("f:1", "empty response", "chosen"),
        Quarantined("f:4", "identical responses"),
        Quarantined("f:7", "empty response", "rejected"),
    )
    result = summary(PAIRS, quarantined)
    assert (result["records"], result["pairs"]) == (12, 9)
    assert list(result["quarantined"].items()) == [
        ("empty response", 2),
        ("identical responses", 1),
    ]
    assert result["quarantined_records"][0] == {
        "source": "f:1",
        "reason": "empty response",
        "detail": "chosen",
    }
    assert [record["source"] for record in result["quarantined_records"]] == ["f:1", "f:4", "f:7"]


def test_records_that_the_template_rejects_are_quarantined() -> None:
    strict = "{{ raise_exception('no system') if messages[0].role == 'system' }}" + BARE
    invalid = Pair([system("s"), user("q")], [assistant("a")], [assistant("b")], 9, "f:10")
    result = summary([*PAIRS, invalid], chat_template=strict)
    assert (result["records"], result["pairs"]) == (10, 9)
    assert result["quarantined"] == {"rejected by the chat template": 1}
    assert result["quarantined_records"][0]["source"] == "f:10"


@pytest.mark.parametrize(
    ("template", "origin"),
    [
        ("auto", "the tokenizer's own"),
        ("none", "none, as requested: plain text"),
        (BARE, "the text in data.chat_template"),
    ],
)
def test_the_template_is_named(template: str, origin: str) -> None:
    assert origin in summary(PAIRS, chat_template=template)["chat_template"]


def test_merges_across_the_boundary_are_counted() -> None:
    merging = [Pair("the ", "and", "b"), Pair("the", " and", " b"), Pair("the a", "nd", "b")]
    assert summary(merging, chat_template="none")["boundary_merges"] == 2


def test_cuts_are_counted_in_pairs_and_in_tokens() -> None:
    pairs = [
        pair_of(5, 5, 5),
        pair_of(5, 5, 5, cut_prompt=3),
        pair_of(5, 5, 5, cut_response=4),
        pair_of(5, 5, 5, cut_prompt=10, cut_response=20),
    ]
    result = summarize(pairs, [], ENCODER)
    assert (result["prompts_cut"], result["responses_cut"], result["tokens_cut"]) == (2, 2, 37)


def test_cut_tokens_are_those_missing_from_the_whole() -> None:
    """The prompt, which both sequences contain, is counted once."""
    long = [Pair(" the" * 30, " sky" * 6, " sea" * 4), Pair(" the", " sky" * 3, " sea" * 3)]
    whole = summary(long, chat_template="none")
    cut = summary(long, chat_template="none", max_length=12, max_prompt_length=8)
    assert (cut["prompts_cut"], cut["responses_cut"]) == (1, 1)
    assert (whole["tokens"] - cut["tokens"]) == 2 * 22 + (cut["tokens_cut"] - 22)


def test_length_quantiles() -> None:
    pairs = [pair_of(1 + n, 11 + n, 31 - n) for n in range(11)]
    lengths = summarize(pairs, [], ENCODER)["lengths"]
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


@given(st.lists(st.builds(pair_of, SIZE, SIZE, SIZE), min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_quantiles_are_sorted_and_end_at_the_extremes(pairs: list[EncodedPair]) -> None:
    lengths = summarize(pairs, [], ENCODER)["lengths"]
    longer = [max(len(p.chosen.tokens), len(p.rejected.tokens)) for p in pairs]
    assert lengths["longer sequence"]["min"] == min(longer)
    assert lengths["longer sequence"]["max"] == max(longer)
    for quantiles in lengths.values():
        assert list(quantiles.values()) == sorted(quantiles.values())


def test_a_summary_is_json() -> None:
    result = summary(PAIRS, (Quarantined("f:1", "empty response"),))
    assert json.loads(json.dumps(result)) == result


def halves(text: Text) -> tuple[str, str]:
    """(text before the brackets, text in them)."""
    before, _, rest = text.plain.partition("⟦")
    inside, bracket, after = rest.partition("⟧")
    assert (bracket, after) == ("⟧", "")
    return before, inside


def test_scored_tokens_are_visible_without_colour() -> None:
    encoded = ENCODER.encode(Pair("Why?", "The sky\nis", "No"))
    unscored, response = halves(marked(encoded.chosen, TINY, "green"))
    assert unscored == (
        "<|im_start|>system↵\nBe kind.<|im_end|>↵\n<|im_start|>user↵\nWhy?<|im_end|>↵\n"
        "<|im_start|>assistant↵\n"
    )
    assert response == "The| sky|↵\n|is|<|im_end|>|"


TEXT = st.text(st.sampled_from("ab the.\n1"), max_size=12)


@given(TEXT, TEXT.filter(str.strip))
@settings(deadline=None, max_examples=60)
def test_every_scored_token_is_followed_by_a_bar(prompt: str, response: str) -> None:
    sequence = ENCODER.encode(Pair(prompt, response, "other")).chosen
    _, marked_response = halves(marked(sequence, TINY, "green"))
    assert marked_response.count("|") == sequence.num_scored + "<|im_end|>".count("|")
    tokens = marked_response.replace("<|im_end|>", "END").split("|")[:-1]
    assert "".join(tokens).replace("↵", "") == f"{response}END"


def rendered_tokens() -> list[tuple[str, Style]]:
    """The scored tokens of "The sky is" as they reach a terminal."""
    text = marked(ENCODER.encode(Pair("Why?", "The sky is", "No")).chosen, TINY, "green")
    segments = list(text.render(Console(force_terminal=True)))
    first = [segment.text for segment in segments].index("⟦") + 1
    return [(s.text, s.style or Style()) for s in segments[first:-1] if s.text != "|"]


def test_neighbouring_tokens_differ_by_colour_and_underline() -> None:
    assert [text for text, _ in rendered_tokens()] == ["The", " sky", " is", "<|im_end|>"]
    assert all(style.color and style.color.name == "green" for _, style in rendered_tokens())
    assert [bool(style.underline) for _, style in rendered_tokens()] == [False, True, False, True]


def test_scored_tokens_are_not_dim() -> None:
    assert not any(style.dim for _, style in rendered_tokens())


def test_smollm2(smollm2_folder: Path) -> None:
    tokenizer = load_only_tokenizer(str(smollm2_folder))
    encoded = Encoder(tokenizer, DataConfig()).encode(Pair("Why?", "\n Because.", "No"))
    unscored, response = halves(marked(encoded.chosen, tokenizer, "green"))
    assert unscored.endswith("<|im_end|>↵\n<|im_start|>assistant")
    assert response == "↵\n↵\n| Because|.|<|im_end|>|"


def test_show_makes_newlines_visible() -> None:
    assert show(TINY, TINY.encode("a\n\nb")) == "a↵\n↵\nb"


def test_a_record_cannot_act_on_the_terminal() -> None:
    """In any division into tokens."""
    text = "a\x1b]52;c;eA==\x07b\r\x9bc"
    pair = ENCODER.encode(Pair("q" + text, text, "no", 0))
    assert not set("\x1b\x07\r\x9b") & set(marked(pair.chosen, TINY, "green").plain)
    tokens = TINY.encode(text, add_special_tokens=False)
    assert show(TINY, tokens) == "a\\x1b]52;c;eA==\\x07b\\r\\x9bc"


# --- pieces of text --------------------------------------------------------------------------


@given(st.text(st.sampled_from("ab é天🎉\n"), max_size=12))
@settings(deadline=None, max_examples=60)
def test_pieces_are_the_text_and_count_the_tokens(text: str) -> None:
    tokens = TINY.encode(text, add_special_tokens=False)
    pieces = Pieces(TINY).split(tokens)
    assert "".join(piece for piece, _ in pieces) == text
    assert sum(count for _, count in pieces) == len(tokens)
    assert "\ufffd" not in "".join(piece for piece, _ in pieces)


def test_a_character_of_several_tokens_is_one_piece() -> None:
    assert Pieces(TINY).split(TINY.encode("a🎉b", add_special_tokens=False)) == [
        ("a", 1),
        ("🎉", 4),
        ("b", 1),
    ]


def test_bytes_that_are_no_character_stay_single() -> None:
    party = TINY.encode("🎉", add_special_tokens=False)
    pieces = Pieces(TINY).split([*party[:2], *TINY.encode("ab", add_special_tokens=False)])
    assert [count for _, count in pieces] == [1, 1, 1, 1]
    assert [text for text, _ in pieces[2:]] == ["a", "b"]


def test_a_space_before_a_word_is_shown_though_the_tokenizer_omits_it() -> None:
    """Llama 2's and Mistral's tokenizers decode the token of " the" alone as "the"."""
    words = tokenizers.Tokenizer(models.WordLevel({"▁a": 0, "▁the": 1, "▁sky": 2, "?": 3}, "?"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.decoder = decoders.Metaspace()
    spaces = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    assert spaces.decode([1]) == "the"
    assert Pieces(spaces).split([1, 2]) == [(" the", 1), (" sky", 1)]


# --- length bias and what templates do -------------------------------------------------------


def test_length_bias_counts_pairs_of_different_lengths() -> None:
    pairs = [pair_of(1, *both) for both in ((5, 3), (5, 3), (3, 5), (4, 4), (9, 1))]
    assert summarize(pairs, [], ENCODER)["length_bias"] == {
        "longer_chosen": 0.75,
        "pairs": 4,
        "mean_chosen": 5.2,
        "mean_rejected": 3.2,
    }
    equal = length_bias(np.array([4]), np.array([4]))
    assert (equal["longer_chosen"], equal["pairs"]) == (None, 0)


def test_what_the_template_does_is_counted_in_pairs() -> None:
    dropped = int(Dropped.TOOLS | Dropped.SYSTEM)
    pairs = [
        pair_of(5, 5, 4),
        pair_of(5, 5, 4, template_tokens=3, dropped=dropped),
        pair_of(5, 5, 4, template_tokens=1, dropped=int(Dropped.SYSTEM)),
    ]
    result = summarize(pairs, [], ENCODER)
    assert result["template_text"] == 2
    assert result["dropped"] == {"tools": 1, "system": 2}
