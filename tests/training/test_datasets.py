"""The datasets of a run: opened, encoded or read from the cache, split."""

from pathlib import Path

import pytest
from helpers.commands import captured_display
from helpers.tiny import some_pairs, split_pairs, write_jsonl

from mlx_simpo import SimPOError, SourceConfig, load_config, load_pairs
from mlx_simpo.data.encode import Encoder
from mlx_simpo.training.datasets import encode_datasets, hold_out
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
    encoded = Encoded(model_folder, data, "data.max_quarantined=0.5")
    assert (
        f"warning: {data}: 2 records quarantined, e.g. missing response: {data}:4" in encoded.text
    )
    assert len(encoded.dataset.pairs) == 3
    with pytest.raises(SimPOError, match="2 of 5 records are quarantined"):
        Encoded(model_folder, data)
