"""Quarantined records are counted by reason; the validation split depends on prompts alone."""

import datetime
import json
import random
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.tiny import assistant, some_pairs, split_pairs, user, write_jsonl
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo import SimPOError
from mlx_simpo.data.messages import as_messages
from mlx_simpo.data.pairs import (
    Quarantined,
    check_share,
    count_reasons,
    held_out,
    load_pairs,
    prompt_text,
)
from mlx_simpo.data.records import Pair

BAD = [
    {"prompt": "q", "chosen": "a", "rejected": "a"},
    {"prompt": "q", "chosen": "", "rejected": "b"},
    {"prompt": "q", "chosen": "b", "rejected": "b"},
]


def quarantined(*reasons: str) -> list[Quarantined]:
    return [Quarantined(f"pairs.jsonl:{n}", reason) for n, reason in enumerate(reasons, start=1)]


def test_each_bad_row_is_quarantined_with_its_line_and_reason(tmp_path: Path) -> None:
    one, two, three = some_pairs(3)
    file = write_jsonl(tmp_path / "pairs.jsonl", [one, BAD[0], two, BAD[1], BAD[2], three])
    with file.open("a") as lines:
        lines.write("\n{broken\n")
    result = load_pairs(str(file))
    assert [(p.prompt, p.index, p.source) for p in result.pairs] == [
        (one["prompt"], 0, f"{file}:1"),
        (two["prompt"], 2, f"{file}:3"),
        (three["prompt"], 5, f"{file}:6"),
    ]
    assert [(q.source, q.reason) for q in result.quarantined] == [
        (f"{file}:2", "identical responses"),
        (f"{file}:4", "empty response"),
        (f"{file}:5", "identical responses"),
        (f"{file}:8", "unreadable row"),
    ]
    assert result.quarantined[0].location == f"{file}:2"
    assert result.quarantined[1].location == f"{file}:4 (chosen)"
    assert list(count_reasons(result.quarantined).items()) == [
        ("identical responses", 2),
        ("empty response", 1),
        ("unreadable row", 1),
    ]


def test_implicit_string_prompts_only_if_enabled(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"chosen": "It is so", "rejected": "It is not"}])
    assert [q.reason for q in load_pairs(str(file)).quarantined] == ["missing prompt"]
    (pair,) = load_pairs(str(file), implicit_string_prompts=True).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ("It is", " so", " not")


def test_a_split_of_a_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", some_pairs(2))
    write_jsonl(tmp_path / "valid.jsonl", [*some_pairs(1), BAD[0]])
    assert len(load_pairs(str(tmp_path), "train").pairs) == 2
    assert len(load_pairs(str(tmp_path), "valid").quarantined) == 1


@given(st.integers(1, 300), st.data())
@settings(deadline=None, max_examples=60)
def test_exactly_the_allowed_share_passes_and_one_more_does_not(
    total: int, data: st.DataObject
) -> None:
    bad = data.draw(st.integers(0, total - 1))
    check_share(total - bad, quarantined(*["x"] * bad), bad / total, "pairs.jsonl")
    with pytest.raises(SimPOError, match=f"{bad + 1} of {total} records are quarantined"):
        check_share(total - bad - 1, quarantined(*["x"] * (bad + 1)), bad / total, "pairs.jsonl")


@pytest.mark.parametrize(("bad", "total", "share"), [(3, 10, 0.3), (1, 20, 0.05), (7, 100, 0.07)])
def test_shares_as_people_write_them(bad: int, total: int, share: float) -> None:
    check_share(total - bad, quarantined(*["x"] * bad), share, "pairs.jsonl")


def test_no_quarantined_record_passes_at_share_zero() -> None:
    check_share(1, [], 0.0, "pairs.jsonl")


def test_the_message_counts_reasons_and_gives_the_first_example_of_each() -> None:
    bad = quarantined("identical responses", "empty response", "empty response")
    bad[1] = bad[1]._replace(detail="chosen")
    with pytest.raises(SimPOError) as caught:
        check_share(7, bad, 0.05, "pairs.jsonl")
    assert str(caught.value) == (
        "pairs.jsonl: 3 of 10 records are quarantined, more than data.max_quarantined=0.05 allows: "
        "2 × empty response, e.g. pairs.jsonl:2 (chosen); "
        "1 × identical responses, e.g. pairs.jsonl:1. "
        "Fix these records, or raise data.max_quarantined"
    )


def test_no_share_allows_a_source_without_a_valid_record() -> None:
    with pytest.raises(
        SimPOError, match=r"2 of 2 .* all of them: 2 × x, e\.g\. pairs\.jsonl:1\. A rec"
    ):
        check_share(0, quarantined("x", "x"), 1.0, "pairs.jsonl")


def test_an_empty_source() -> None:
    with pytest.raises(SimPOError, match=r"pairs\.jsonl is empty; it must hold at least one"):
        check_share(0, [], 1.0, "pairs.jsonl")


def pairs_of(prompts: list) -> list[Pair]:
    return [Pair(prompt, "a", "b", index) for index, prompt in enumerate(prompts)]


def indices(pairs: list[Pair]) -> list[int]:
    return [pair.index for pair in pairs]


PROMPTS = st.lists(st.integers(0, 12), max_size=40)


@given(PROMPTS, st.floats(0, 0.99), st.integers(0, 5), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_split(numbers: list[int], fraction: float, seed: int, rng: random.Random) -> None:
    pairs = pairs_of([f"q{n}" for n in numbers])
    train, valid = split_pairs(pairs, fraction, seed)
    assert Counter(indices(train + valid)) == Counter(range(len(pairs)))
    assert not {p.prompt for p in train} & {p.prompt for p in valid}
    assert indices(train) == sorted(indices(train))
    assert indices(valid) == sorted(indices(valid))
    prompts, held = len(set(numbers)), len({p.prompt for p in valid})
    if fraction == 0 or prompts < 2:
        assert held == 0
    else:
        assert 1 <= held < prompts
        assert abs(held - fraction * prompts) <= 1
    shuffled = list(pairs)
    rng.shuffle(shuffled)
    assert split_pairs(shuffled, fraction, seed) == (train, valid)


def split_by_definition(pairs: list[Pair], fraction: float, seed: int) -> tuple[list, list]:
    """The first version of `split_pairs`, unchanged: older runs held out the same pairs."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        messages = as_messages(pair.prompt, "user")
        text = json.dumps([seed, messages], sort_keys=True, ensure_ascii=True, default=str)
        groups.setdefault(sha256(text.encode()).hexdigest(), []).append(pair)
    held = min(max(1, round(fraction * len(groups))), len(groups) - 1) if fraction > 0 else 0
    order = sorted(groups)
    valid = sorted((p for key in order[:held] for p in groups[key]), key=lambda p: p.index)
    train = sorted((p for key in order[held:] for p in groups[key]), key=lambda p: p.index)
    return train, valid


QUESTION = st.text(max_size=3) | st.builds(lambda text: [user(text)], st.text(max_size=3))


@given(st.lists(QUESTION, max_size=60), st.floats(0, 0.99), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=150)
def test_the_split_equals_that_of_the_first_version(
    prompts: list, fraction: float, seed: int
) -> None:
    pairs = pairs_of(prompts)
    expected = split_by_definition(pairs, fraction, seed)
    assert split_pairs(pairs, fraction, seed) == expected
    held = held_out((prompt_text(pair).encode() for pair in pairs), fraction, seed)
    assert np.flatnonzero(held).tolist() == indices(expected[1])


def test_the_seed_decides_which_prompts_are_held_out() -> None:
    pairs = pairs_of([f"q{n}" for n in range(50)])
    held = {tuple(indices(split_pairs(pairs, 0.1, seed)[1])) for seed in range(10)}
    assert len(held) == 10
    assert {len(indices) for indices in held} == {5}


def test_further_pairs_with_the_same_prompts_do_not_change_the_split() -> None:
    prompts = [f"q{n}" for n in range(40)]
    before = {p.prompt for p in split_pairs(pairs_of(prompts), 0.25, 0)[1]}
    after = {p.prompt for p in split_pairs(pairs_of(prompts[::-1] * 3), 0.25, 0)[1]}
    assert before == after


def test_messages_are_compared_by_content_not_by_key_order() -> None:
    one, other = [{"role": "user", "content": "q"}], [{"content": "q", "role": "user"}]
    train, valid = split_pairs(pairs_of([one, other, [user("z")]]), 0.5, 0)
    assert sorted([indices(train), indices(valid)]) == [[0, 1], [2]]


def test_the_same_question_in_two_forms_stays_on_one_side() -> None:
    questions = [f"q{n}" for n in range(20)]
    train, valid = split_pairs(pairs_of(questions + [[user(q)] for q in questions]), 0.5, 0)
    assert {i % 20 for i in indices(train)}.isdisjoint(i % 20 for i in indices(valid))


def test_messages_with_a_timestamp(tmp_path: Path) -> None:
    """As in WildChat: Parquet has types that JSON has not."""
    rows = [
        {
            "prompt": [{**user(f"q{n}"), "timestamp": datetime.datetime(2026, 1, 1)}],
            "chosen": [assistant("a")],
            "rejected": [assistant("b")],
        }
        for n in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pairs.parquet")
    result = load_pairs(str(tmp_path / "pairs.parquet"))
    assert [len(side) for side in split_pairs(result.pairs, 0.5, 0)] == [2, 2]


def test_texts_that_cannot_be_encoded_can_be_split() -> None:
    """A lone surrogate is valid JSON, but cannot be encoded."""
    pairs = pairs_of([json.loads(r'"\ud800"'), "\x00", ""])
    assert [len(side) for side in split_pairs(pairs, 0.5, 0)] == [1, 2]
