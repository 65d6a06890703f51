"""What conversions are compared with, without torch. (Mistakes that it detects: test_mistakes_*.py.
With torch: tests/parity/test_convert_commands.py.)"""

import json
from pathlib import Path

import mlx.core as mx
import pytest
from helpers.commands import captured_display
from helpers.mlx_folders import mlx_adapter, mlx_model
from helpers.tiny import tiny_folder

from mlx_simpo import SimPOError, load_model
from mlx_simpo.convert.base import Base
from mlx_simpo.convert.verify import proof
from mlx_simpo.convert.verify.compare import Comparison
from mlx_simpo.model.adapters import flat_arrays


def test_all_comparisons_are_shown_and_a_failed_one_is_an_error() -> None:
    display, text = captured_display()
    passed = Comparison("a", largest=1.0, mean=0.5, agreement=1.0, limit=2.0)
    failed = passed._replace(what="b", limit=0.5)
    assert proof.show_and_check([passed], display) == [passed]
    with pytest.raises(SimPOError, match=r"verification failed.* b: logits differ by 1\.0e\+00"):
        proof.show_and_check([failed, passed], display)
    assert text.getvalue().count("logits differ") == 3


def test_contradicting_rotary_settings_are_an_error(tmp_path: Path) -> None:
    config = {"rope_theta": 5.0, "rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    proof.check_rope_settings(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 6.0}))
    with pytest.raises(SimPOError, match=r"config\.json has two values of rope_theta"):
        proof.check_rope_settings(tmp_path)


@pytest.mark.parametrize(("model_type", "expected"), [("llama", 0.0), ("gemma", None)])
def test_a_known_deviation_is_noted_and_not_checked(
    model_type: str, expected: float | None, tmp_path: Path
) -> None:
    loaded = load_model(str(tiny_folder(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    display, text = captured_display()
    assert proof.assumed_baseline(loaded, display) == expected
    assert ("only shown, not checked: mlx-lm computes the exact GELU" in text.getvalue()) == (
        expected is None
    )


def test_rounding_in_memory_needs_the_same_weights(tmp_path: Path) -> None:
    folder = mlx_model(tmp_path / "base")
    base, adapter = Base(str(folder)), mlx_adapter(folder, tmp_path / "adapter")
    names = flat_arrays(base.load().model.parameters()).keys()
    dtypes = dict.fromkeys(names, mx.bfloat16)
    rounded = flat_arrays(proof.merged_and_rounded(base, adapter, dtypes).parameters())
    assert {array.dtype for array in rounded.values()} == {mx.bfloat16}
    dtypes.pop("model.norm.weight")
    with pytest.raises(SimPOError, match=r"not have the same weights, e.g. model\.norm\.weight"):
        proof.merged_and_rounded(base, adapter, dtypes)
