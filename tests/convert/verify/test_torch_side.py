"""Whether torch, transformers and PEFT are installed. (What they compute: tests/parity.)"""

import pytest

from mlx_simpo.convert.verify import torch_side


@pytest.mark.parametrize(
    ("installed", "expected"),
    [
        (["torch", "transformers", "peft"], None),
        (["transformers", "peft"], "torch is not installed"),
        (["peft"], "torch and transformers are not installed"),
    ],
)
def test_missing_packages_are_named(
    installed: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_side.importlib.util, "find_spec", lambda n: n in installed or None)
    assert torch_side.missing_packages() == expected
