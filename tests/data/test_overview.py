"""Several sources: what is compared with what."""

from pathlib import Path

from data.test_duplicates import OTHERS, TEXTS, stored

from mlx_simpo.data.mixing import Mixture
from mlx_simpo.data.overview import TRAIN, VALID, InspectedSource, Overview, overview


def overview_of(folder: Path, **sources: tuple) -> Overview:
    """The overview of sources: name=(role, prompts) or (role, prompts, responses)."""
    read = [
        InspectedSource(name, role, stored(folder / name, *content), [])
        for name, (role, *content) in sources.items()
    ]
    return overview(read, Mixture({source.name: source.pairs for source in read}))


def test_training_sources_are_one_and_each_validation_set_is_compared_with_them(
    tmp_path: Path,
) -> None:
    result = overview_of(
        tmp_path,
        a=(TRAIN, [OTHERS[0], TEXTS[0]], [(1, 2), (1, 2)]),
        b=(TRAIN, [TEXTS[1], TEXTS[0]], [(1, 2), (2, 1)]),
        chat=(VALID, [OTHERS[1], OTHERS[0], OTHERS[1]], [(1, 2), (1, 2), (1, 2)]),
        safety=(VALID, [TEXTS[1].replace("polite", "kind"), OTHERS[1]]),
    )
    assert result.names == ("a", "b", "chat", "safety")
    assert result.starts == (0, 2, 4, 7, 9)
    assert result.distinct == (2, 2, 2, 2)
    assert result.repeats.distinct_prompts == 5
    assert result.repeated_prompts == 4
    assert result.repeats.contradictory == [(3, 1)]
    assert result.repeats.pairs == [(6, 4)]
    assert [(leaks.source, leaks.others, leaks.checked) for leaks in result.leaks] == [
        ("chat", ("a", "b"), 3),
        ("safety", ("a", "b"), 2),
    ]
    assert [[match[:2] for match in leaks.matches] for leaks in result.leaks] == [
        [(5, 0)],
        [(7, 2)],
    ]
    record = result.as_dict()
    assert record["contradictory_pairs"] == [["b.jsonl:2", "a.jsonl:2"]]
    assert record["leaks"][0]["records"] == [
        {"pair": "chat.jsonl:2", "like": "a.jsonl:1", "similarity": 1.0, "is_same": True}
    ]
    assert record["leaks"][1]["in"] == ["a", "b"]
    assert not record["leaks"][1]["records"][0]["is_same"]


def test_sources_without_a_role_are_compared_with_all_before(tmp_path: Path) -> None:
    result = overview_of(
        tmp_path,
        a=("", [OTHERS[0], TEXTS[0]]),
        b=("", [OTHERS[1], TEXTS[0]]),
        c=("", [OTHERS[1], OTHERS[0], TEXTS[3]]),
    )
    assert [(leaks.source, leaks.others) for leaks in result.leaks] == [
        ("b", ("a",)),
        ("c", ("a", "b")),
    ]
    assert [[match[:2] for match in leaks.matches] for leaks in result.leaks] == [
        [(3, 1)],
        [(4, 2), (5, 0)],
    ]
    assert result.repeats.pairs == []


def test_near_prompts_have_the_indices_of_all_pairs(tmp_path: Path) -> None:
    near = [TEXTS[0], TEXTS[0].replace("six", "seven")]
    result = overview_of(
        tmp_path, a=(TRAIN, OTHERS), b=(TRAIN, near), v=(VALID, [TEXTS[2], *near]), w=(VALID, near)
    )
    assert [match[:2] for match in result.repeats.near] == [(5, 4), (8, 7), (10, 9)]
    assert result.as_dict()["near_prompts"][1]["pair"] == "v.jsonl:3"


def test_one_source_and_only_validation_sets(tmp_path: Path) -> None:
    assert overview_of(tmp_path, a=(TRAIN, OTHERS)).leaks == ()
    result = overview_of(tmp_path, v=(VALID, OTHERS), w=(VALID, OTHERS))
    assert [leaks.source for leaks in result.leaks] == ["w"]


def test_without_training_pairs_every_set_is_compared_with_all_before_it(tmp_path: Path) -> None:
    result = overview_of(tmp_path, u=(VALID, TEXTS), v=(VALID, OTHERS), w=(VALID, OTHERS))
    assert [(leaks.others, len(leaks.matches)) for leaks in result.leaks] == [
        (("u",), 0),
        (("u", "v"), len(OTHERS)),
    ]
