"""The conversions with their own verification, torch included. Other files convert without it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import written_report
from parity.wrapped import MODELS
from parity.zoo import ZOO, assert_agree, mlx_adapter, mlx_logits, saved, torch_logits

from mlx_simpo import SimPOError, from_hf, from_peft, fuse, to_peft
from mlx_simpo.convert import names
from mlx_simpo.convert.architectures import TABLE
from mlx_simpo.convert.peft.config import PeftConfig

CLOSE = 1e-3
PEFT_FAILS = ("granitemoe", "qwen2_moe", "phimoe")
SEPARATE = [n for n, zoo in ZOO.items() if zoo.experts and n not in PEFT_FAILS]


def test_the_zoo_has_every_type_of_the_table() -> None:
    assert {zoo.model_type for zoo in (*ZOO.values(), *MODELS.values())} == {
        name for name, entry in TABLE.items() if not entry.refused
    }


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3_moe", "qwen3_5_text", "deepseek_v3"])
def test_every_conversion_is_verified_with_torch(name: str, tmp_path: Path) -> None:
    """Also where mlx-lm itself deviates."""
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
def test_a_base_model_that_differs_by_itself_is_reported(name: str, tmp_path: Path) -> None:
    """A mistake of the conversion that is smaller than this difference would not be noticed."""
    base = saved(name, tmp_path / "base")
    display, text = written_report()
    to_peft(mlx_adapter(base, tmp_path / "mlx"), tmp_path / "peft", verify=True, display=display)
    is_reported = "MLX and transformers on the base model itself" in text.getvalue()
    assert is_reported == (name == "gemma")
    assert ("exact GELU" in text.getvalue()) == is_reported


@pytest.mark.parametrize("name", SEPARATE)
def test_separate_experts_to_peft(name: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx")
    done = to_peft(adapter, tmp_path / "peft", separate_experts=True, verify=True)
    assert len(done.comparisons) == 2
    ours = mlx_logits(base, adapter=adapter)
    assert_agree(torch_logits(base, adapter=done.output), ours, ZOO[name].floor + CLOSE)


@pytest.mark.parametrize(
    ("name", "why"),
    [("granitemoe", "never had single experts"), ("phimoe", "PEFT does not join single experts")],
)
def test_experts_that_cannot_be_separate(name: str, why: str, tmp_path: Path) -> None:
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx")
    with pytest.raises(SimPOError, match=why):
        to_peft(adapter, tmp_path / "peft", separate_experts=True, verify=False)


def test_separate_experts_of_phimoe_are_rejected(tmp_path: Path) -> None:
    """PEFT ignores such experts when it loads the adapter, so nothing could be compared."""
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


def exchange_gate_and_up(patch: pytest.MonkeyPatch) -> None:
    """Exchange gate_proj and up_proj, for the reader and the writer alike."""
    fused = names._FUSED
    patch.setitem(fused, "gate_proj", ("gate_up_proj", (1, 2)))
    patch.setitem(fused, "up_proj", ("gate_up_proj", (0, 2)))


def double_alpha(patch: pytest.MonkeyPatch) -> None:
    """Let the reader double lora_alpha; a conversion from PEFT relies on the reader alone."""
    right = PeftConfig.scale

    def wrong(config: PeftConfig, path: str) -> tuple[int, float]:
        rank, scale = right(config, path)
        return rank, 2 * scale

    patch.setattr(PeftConfig, "scale", wrong)


@pytest.mark.parametrize(
    ("name", "plant", "back"),
    [
        ("mixtral", exchange_gate_and_up, False),
        ("mixtral", exchange_gate_and_up, True),
        ("llama", double_alpha, True),
    ],
)
def test_mistakes_that_reader_and_writer_share(
    name: str, plant: Any, back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLX alone cannot notice them; PEFT does, where it is installed."""
    base = saved(name, tmp_path / "base")
    adapter = mlx_adapter(base, tmp_path / "mlx")
    if back:
        adapter = to_peft(adapter, tmp_path / "peft", verify=True).output
    plant(monkeypatch)
    with pytest.raises(SimPOError, match=r"not right .* PEFT in torch"):
        (from_peft if back else to_peft)(adapter, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()
