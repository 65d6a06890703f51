"""The commands with their own verification, torch included, where the matrix of the other files
calls the functions behind them without it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import written_report
from parity.wrapped import MODELS
from parity.zoo import ZOO, agree, mlx_adapter, mlx_logits, saved, torch_logits

from mlx_simpo import SimPOError, from_hf, from_peft, fuse, to_peft
from mlx_simpo.convert import names
from mlx_simpo.convert.architectures import TABLE
from mlx_simpo.convert.peft.config import PeftConfig

CLOSE = 1e-3
PEFT_FAILS = ("granitemoe", "qwen2_moe", "phimoe")
SEPARATE = [n for n, zoo in ZOO.items() if zoo.experts and n not in PEFT_FAILS]


def test_every_type_of_the_table_is_in_the_zoo() -> None:
    assert {zoo.model_type for zoo in (*ZOO.values(), *MODELS.values())} == {
        name for name, entry in TABLE.items() if not entry.refused
    }


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3_moe", "qwen3_5_text", "deepseek_v3"])
def test_everything_verified(name: str, tmp_path: Path) -> None:
    """What the commands compare, they compare with torch; also where mlx-lm itself deviates."""
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx")
    there = to_peft(adapter, tmp_path / "peft", verify=True)
    back = from_peft(there.output, tmp_path / "back", verify=True)
    fused = fuse(tmp_path / "fused", adapter=adapter, verify=True)
    loaded = from_hf(str(base), tmp_path / "from-hf", verify=True)
    for done, count in ((there, 2), (back, 2), (fused, 2), (loaded, 3)):
        assert len(done.comparisons) == count
        assert all(c.passed for c in done.comparisons)
        assert all(c.limit is None or c.limit < 4e-3 for c in done.comparisons)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_base_that_differs_by_itself_is_said(name: str, tmp_path: Path) -> None:
    """What it differs by hides as much of a conversion's mistakes."""
    base = saved(name, tmp_path / "base")
    display, text = written_report()
    to_peft(mlx_adapter(base, tmp_path / "mlx"), tmp_path / "peft", verify=True, display=display)
    said = "MLX and transformers on the base model itself" in text.getvalue()
    assert said == (name == "gemma")
    assert ("exact GELU" in text.getvalue()) == said


@pytest.mark.parametrize("name", SEPARATE)
def test_a_pair_of_matrices_for_each_expert(name: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx")
    done = to_peft(adapter, tmp_path / "peft", separate_experts=True, verify=True)
    assert len(done.comparisons) == 2
    ours = mlx_logits(base, adapter=adapter)
    agree(torch_logits(base, adapter=done.output), ours, ZOO[name].floor + CLOSE)


@pytest.mark.parametrize(
    ("name", "why"),
    [("granitemoe", "never had single experts"), ("phimoe", "PEFT does not join single experts")],
)
def test_experts_that_cannot_be_single(name: str, why: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx")
    with pytest.raises(SimPOError, match=why):
        to_peft(adapter, tmp_path / "peft", separate_experts=True, verify=False)


def test_single_experts_of_phimoe_are_not_read(tmp_path: Path) -> None:
    """PEFT reads them as an adapter without the experts: there is nothing to hold them to."""
    base, rule = saved("phimoe", tmp_path / "base"), TABLE["phimoe"]
    adapter = mlx_adapter(base, tmp_path / "mlx")
    assert rule.experts is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TABLE, "phimoe", replace(rule, experts=replace(rule.experts, unpaired="")))
        with pytest.raises(SimPOError, match="PEFT in torch: logits differ"):
            to_peft(adapter, tmp_path / "wrong", separate_experts=True, verify=True)
        to_peft(adapter, tmp_path / "peft", separate_experts=True, verify=False)
    with pytest.raises(SimPOError, match="PEFT does not join single experts"):
        from_peft(tmp_path / "peft", tmp_path / "back", model=str(base), verify=False)


def exchanged(patch: pytest.MonkeyPatch) -> None:
    """gate_proj and up_proj in each other's place, for reader and writer alike."""
    fused = names._FUSED
    patch.setitem(fused, "gate_proj", ("gate_up_proj", (1, 2)))
    patch.setitem(fused, "up_proj", ("gate_up_proj", (0, 2)))


def twice(patch: pytest.MonkeyPatch) -> None:
    """lora_alpha counted twice by the reader, whose word a conversion from PEFT takes."""
    right = PeftConfig.scale

    def wrong(config: PeftConfig, path: str) -> tuple[int, float]:
        rank, scale = right(config, path)
        return rank, 2 * scale

    patch.setattr(PeftConfig, "scale", wrong)


@pytest.mark.parametrize(
    ("name", "plant", "back"),
    [("mixtral", exchanged, False), ("mixtral", exchanged, True), ("llama", twice, True)],
)
def test_mistakes_that_both_of_our_sides_share(
    name: str, plant: Any, back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX alone cannot see them; PEFT does, where it is installed."""
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx")
    if back:
        adapter = to_peft(adapter, tmp_path / "peft", verify=True).output
    plant(monkeypatch)
    with pytest.raises(SimPOError, match=r"not right .* PEFT in torch"):
        (from_peft if back else to_peft)(adapter, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()
