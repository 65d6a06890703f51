"""The datasets of a run: opened, encoded or read from the cache, split."""

from pathlib import Path
from typing import Any

import pytest
from helpers.commands import captured_display
from helpers.stored import make_pairs, write_and_open
from helpers.tiny import BARE, some_pairs, split_pairs, tiny_folder, write_jsonl

from mlx_simpo import (
    DataConfig,
    SimPOConfig,
    SimPOError,
    SourceConfig,
    load_config,
    load_pairs,
)
from mlx_simpo.data.encode import Encoder
from mlx_simpo.training.datasets import encode_datasets, hold_out, limit, read_pairs
from mlx_simpo.training.inputs import open_dataset


class Encoded:
    """One dataset as tokens, with the settings that it was read with and what was shown."""

    def __init__(self, model: Path, data: Path, *settings: str) -> None:
        display, text = captured_display()
        display.console.width = 1000
        self.config = load_config(None, [f"model={model}", f"data.train={data}", *settings])
        source = open_dataset(self.config, SourceConfig(str(data)), display)
        _, (self.dataset,) = encode_datasets(self.config, [source], display)
        self.text = text.getvalue()

    def parts(self) -> tuple[list[int], list[int]]:
        """The indices of the training pairs and of those held out."""
        train, valid = hold_out(self.dataset.pairs, self.config, captured_display()[0])
        return [p.index for p in train], [p.index for p in valid]


def test_a_second_start_reads_the_tokens_of_the_first(
    model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("MLX_SIMPO_CACHE", str(cache))
    first = Encoded(model_folder, pairs_file)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoder, "encode", lambda *_: pytest.fail("was encoded again"))
        second = Encoded(
            model_folder, pairs_file, "seed=7", "data.valid_fraction=0.4", "data.max_quarantined=0"
        )
    assert first.parts() != second.parts()
    assert sorted(index for part in second.parts() for index in part) == list(range(12))
    assert f"tokens are loaded from the cache in {cache / 'tokens'}" in second.text
    (folder,) = (cache / "tokens").iterdir()
    (folder / "tokens.bin").write_bytes(b"")
    third = Encoded(model_folder, pairs_file)
    assert "warning: the cached tokens in" in third.text
    assert third.parts() == first.parts()


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("seed", [0, 1, 42])
def test_the_fraction_held_out_is_a_fraction_of_the_valid_pairs(
    model_folder: Path, tmp_path: Path, fraction: float, seed: int
) -> None:
    """With repeated prompts, and a pair that is quarantined only when it is encoded."""
    same = "the same words again and again " * 12
    bad = {"prompt": "P?", "chosen": f"{same}x", "rejected": f"{same}y"}
    records = [r | {"prompt": f"q{i % 9}"} for i, r in enumerate(some_pairs(30))]
    data = write_jsonl(tmp_path / "d.jsonl", [*records[:7], bad, *records[7:]])
    limits = ("data.max_length=100", "data.max_prompt_length=60")
    encoded = Encoded(
        model_folder, data, *limits, f"data.valid_fraction={fraction}", f"seed={seed}"
    )
    valid = [pair for pair in load_pairs(str(data)).pairs if pair.index != 7]
    expected = split_pairs(valid, fraction, seed)
    assert encoded.parts() == tuple([p.index for p in part] for part in expected)
    assert [q.source for q in encoded.dataset.quarantined] == [f"{data}:8"]


def test_quarantined_records_are_counted_and_the_first_one_is_shown(
    model_folder: Path, tmp_path: Path
) -> None:
    rows = [*some_pairs(3), {"prompt": "x"}, {"prompt": "y"}]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    one = write_jsonl(tmp_path / "one.jsonl", rows[:4])
    one_text = Encoded(model_folder, one, "data.max_quarantined=0.5").text
    assert f"warning: {one}: 1 record quarantined, e.g. missing response" in one_text
    encoded = Encoded(model_folder, data, "data.max_quarantined=0.5")
    assert (
        f"warning: {data}: 2 records quarantined, e.g. missing response: {data}:4" in encoded.text
    )
    assert len(encoded.dataset.pairs) == 3
    with pytest.raises(SimPOError, match="2 of 5 records are quarantined"):
        Encoded(model_folder, data)


# --- mixing, holding out, limiting -----------------------------------------------------------


def mixed_files(folder: Path, **sizes: int) -> dict[str, Path]:
    """Write NAME.jsonl with so many pairs; each prompt occurs in every file."""
    return {
        name: write_jsonl(
            folder / f"{name}.jsonl",
            [r | {"chosen": f"{r['chosen']} {name}"} for r in some_pairs(size)],
        )
        for name, size in sizes.items()
    }


class Arranged:
    """The pairs of a run with these settings of the section data, and what was shown."""

    def __init__(self, model: Path, **data: Any) -> None:
        display, text = captured_display()
        display.console.width = 1000
        config = SimPOConfig(model=str(model), data=DataConfig(**data))
        _, self.pairs, self.quarantined = read_pairs(config, None, None, display)
        self.text = text.getvalue()

    @property
    def sources(self) -> tuple[list[str], list[str]]:
        """file:line of the training pairs and of the unnamed validation set."""
        return [p.source for p in self.pairs.train], [p.source for p in self.pairs.valid[""]]


def line_numbers(sources: list[str]) -> set[str]:
    return {source.rpartition(":")[2] for source in sources}


def test_prompts_are_held_out_of_all_sources_together(model_folder: Path, tmp_path: Path) -> None:
    paths = mixed_files(tmp_path, a=12, b=12, c=12)
    arranged = Arranged(model_folder, train=[str(p) for p in paths.values()], valid_fraction=0.25)
    train, valid = arranged.sources
    assert (len(train), len(valid)) == (27, 9)
    assert line_numbers(train).isdisjoint(line_numbers(valid))  # the same line: the same prompt
    expected = {f"{path}:{number}" for path in paths.values() for number in line_numbers(valid)}
    assert set(valid) == expected
    assert {name: c.pairs for name, c in arranged.pairs.sources.items()} == {"a": 9, "b": 9, "c": 9}


def test_the_weights_are_those_of_the_pairs_that_remain(model_folder: Path, tmp_path: Path) -> None:
    paths = mixed_files(tmp_path, a=40, b=10)
    train = [{"path": str(paths["a"]), "weight": 3}, {"path": str(paths["b"]), "weight": 1}]
    arranged = Arranged(model_folder, train=train, valid_fraction=0.2)
    a, b = arranged.pairs.sources.values()
    assert a.pairs == 32
    assert b.per_epoch == b.pairs
    assert a.per_epoch == 3 * b.per_epoch
    assert (a.share, b.share) == (0.75, 0.25)
    assert (
        f"a: 32 pairs to train on, 0 records quarantined; an epoch takes {a.per_epoch} "
        "of them, 75.0% of the epoch"
    ) in arranged.text


def test_quarantined_records_are_counted_per_source(model_folder: Path, tmp_path: Path) -> None:
    good = write_jsonl(tmp_path / "good.jsonl", some_pairs(6))
    bad = write_jsonl(tmp_path / "bad.jsonl", [*some_pairs(8), {"prompt": "x"}])
    train = [str(good), str(bad)]
    arranged = Arranged(model_folder, train=train, valid_fraction=0.0, max_quarantined=0.2)
    assert [c.quarantined for c in arranged.pairs.sources.values()] == [0, 1]
    assert [q.source for q in arranged.quarantined] == [f"{bad}:9"]
    assert (
        "bad: 8 pairs to train on, 1 record quarantined; an epoch takes 8 of them, 57.1%"
        in arranged.text
    )
    with pytest.raises(SimPOError, match=r"bad\.jsonl: 1 of 9 records are quarantined"):
        # One of 15, but the share counts per source.
        Arranged(model_folder, train=train, max_quarantined=0.1)


def test_a_source_with_a_weight_must_keep_pairs_to_train_on(
    model_folder: Path, tmp_path: Path
) -> None:
    paths = mixed_files(tmp_path, a=12, b=1)
    alone = [str(p) for p in paths.values()]
    weighted = [{"path": path, "weight": 1} for path in alone]
    # A fraction of which the only prompt of b is a part.
    fraction = next(
        fraction
        for fraction in (0.1, 0.3, 0.5, 0.7, 0.9)
        if not Arranged(model_folder, train=alone, valid_fraction=fraction).pairs.train.sizes["b"]
    )
    with pytest.raises(SimPOError, match="no pair of the source 'b' is left to train on, because"):
        Arranged(model_folder, train=weighted, valid_fraction=fraction)


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_no_more_pairs_are_held_out_than_are_evaluated(
    limit: int, model_folder: Path, tmp_path: Path
) -> None:
    """Whole prompts: the others stay in the training."""
    paths = mixed_files(tmp_path, a=20, b=20)
    settings: dict[str, Any] = {"train": [str(p) for p in paths.values()], "valid_fraction": 0.5}
    everything = Arranged(model_folder, **settings, valid_max=None)
    limited = Arranged(model_folder, **settings, valid_max=limit)
    train, valid = limited.sources
    assert len(everything.sources[1]) == 20
    assert len(valid) == (1 if limit == 1 else limit - 1)  # each prompt has two pairs
    assert set(valid) < set(everything.sources[1])
    assert line_numbers(train).isdisjoint(line_numbers(valid))
    assert len(train) == 38 if limit < 5 else 36
    held = 2 if limit == 1 else len(valid)
    assert f"evaluating on {held} of 20 pairs (data.valid_max); the others are trained on" in (
        limited.text
    )


def test_a_validation_set_is_limited_by_a_sample(model_folder: Path, tmp_path: Path) -> None:
    paths = mixed_files(tmp_path, a=12, b=30, c=4)
    settings: dict[str, Any] = {
        "train": str(paths["a"]),
        "valid": {"chat": str(paths["b"]), "code": str(paths["c"])},
        "valid_max": 5,
    }
    arranged, again = Arranged(model_folder, **settings), Arranged(model_folder, **settings)
    chat, code = arranged.pairs.valid.values()
    assert (len(chat), len(code)) == (5, 4)
    assert [p.index for p in chat] == [p.index for p in again.pairs.valid["chat"]]
    assert [p.index for p in chat] == sorted({p.index for p in chat})
    assert "evaluating on 5 of 30 pairs of chat (data.valid_max)\n" in arranged.text
    assert "pairs of code" not in arranged.text


def test_a_folder_without_a_validation_file_has_pairs_held_out(
    model_folder: Path, tmp_path: Path
) -> None:
    mixed_files(tmp_path, train=12, test=5)
    arranged = Arranged(model_folder, folder=str(tmp_path), valid_fraction=0.25)
    assert [len(part) for part in arranged.sources] == [9, 3]
    assert (
        f"{tmp_path} has no validation file (valid.jsonl); data.valid_fraction=0.25 of the "
        "training prompts are held out"
    ) in arranged.text


def test_one_source_is_mixed_with_nothing(model_folder: Path, pairs_file: Path) -> None:
    arranged = Arranged(model_folder, train=str(pairs_file), valid_fraction=0.0)
    assert "an epoch takes" not in arranged.text
    assert arranged.pairs.sources == {"pairs": (12, 0, 12, 1.0)}
    assert arranged.pairs.valid == {}


def test_what_the_template_adds_and_drops_is_told_from_the_cache_as_well(tmp_path: Path) -> None:
    template = BARE.replace(
        "{{ m['content'] }}", "{{ '[x]' if m.role == 'assistant' }}{{ m.content }}"
    )
    rows = [{**row, "tools": [{"name": "sky"}]} for row in some_pairs(3)]
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    model = tiny_folder(tmp_path / "model", template=template)
    texts = [Encoded(model, data).text for _ in range(2)]
    assert "tokens are loaded from the cache" in texts[1]
    for text in texts:
        for message in (
            f"{data}: the chat template itself writes '[x]' before the responses of 3 of 3 pairs",
            f"warning: {data}: the chat template does not write the tools of 3 of 3 pairs (e.g. "
            f"{data}:1)",
        ):
            assert text.count(message) == 1


def test_a_limit_draws_from_all_pairs_with_the_seed_of_the_run(tmp_path: Path) -> None:
    pairs = write_and_open(tmp_path / "pairs", make_pairs(12), [b"p"] * 12)

    def drawn(size: int | None, seed: int) -> tuple[list[int], str]:
        display, text = captured_display()
        config = SimPOConfig(model="m", data=DataConfig(valid_max=size), seed=seed)
        return [pair.index for pair in limit(pairs, "chat", config, display)], text.getvalue()

    samples = [drawn(4, seed)[0] for seed in range(20)]
    assert all(len(sample) == 4 for sample in samples)
    assert len(set(map(tuple, samples))) > 15
    assert {index for sample in samples for index in sample} == set(range(12))
    for size in (12, 13, None):
        assert drawn(size, 0) == (list(range(12)), "")
