"""A run holds no more after many steps than after few. benchmarks/soak.py takes thousands."""

import gc
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.commands import small_run
from helpers.growth import SamplingDisplay, open_files, threads
from helpers.tiny import some_pairs, write_jsonl

from mlx_simpo import load_config, train
from mlx_simpo.training import watch

# After so many steps, all that has an end has reached it: the watch over the steps remembers fewer.
FULL = 27
REMEMBERED = 20
STEPS = 24
# What a run may hold more after STEPS more steps: less than the tokens of a micro-batch per step,
# and less than one object for each of its eight evaluations.
MARGINS = {"active_bytes": 200 * STEPS, "objects": 7, "open_files": 0, "threads": 0}


def held() -> dict[str, int]:
    """Return what this process holds that nothing may wait for to be freed."""
    gc.collect()
    return {
        "active_bytes": mx.get_active_memory(),
        "objects": len(gc.get_objects()),
        "open_files": open_files(),
        "threads": threads(),
    }


@pytest.mark.parametrize(
    "settings",
    [
        ["train.engine=shared_prefix"],
        ["train.engine=reference", "train.compile=true"],
        ["train.gradient_checkpointing=true", "lora.dropout=0.1"],
    ],
    ids=["shared_prefix", "compiled", "checkpointing"],
)
def test_nothing_accumulates(
    settings: list[str], model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a run with evaluations, checkpoints and responses every third step."""
    monkeypatch.setattr(watch, "HISTORY", REMEMBERED)
    pairs = write_jsonl(tmp_path / "pairs.jsonl", some_pairs(30))
    often = [f"train.steps={FULL + STEPS + 1}", "train.eval_every=3", "train.save_every=3"]
    often += ["train.sample_prompts=[Why]", "train.sample_tokens=2"]
    display = SamplingDisplay(3, held)
    run = small_run(model_folder, pairs, tmp_path / "run", *often, *settings)
    train(load_config(None, run), display)
    # Batches differ in size, so the largest of two epochs' samples are compared.
    ends = (FULL // 3, (FULL + STEPS) // 3)
    before, after = (display.samples[end - 4 : end] for end in ends)
    growth = {n: max(s[n] for s in after) - max(s[n] for s in before) for n in MARGINS}
    assert {name: more for name, more in growth.items() if more > MARGINS[name]} == {}
