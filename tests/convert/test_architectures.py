"""The table of architectures: what it says about types that are not converted, and how it is
listed. (Every other entry against transformers and PEFT: tests/parity.)"""

import pytest
from helpers.commands import command, complaint

from mlx_simpo import SimPOError
from mlx_simpo.convert.architectures import (
    TABLE,
    check_adaptable,
    known_deviation,
    table_entry,
)

UNSUPPORTED = {name for name, entry in TABLE.items() if entry.unsupported}


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_an_unsupported_type_is_an_error_with_its_reason(name: str) -> None:
    with pytest.raises(SimPOError, match=f"type {name} are not converted: .*architectures") as info:
        table_entry({"model_type": name})
    assert TABLE[name].unsupported in str(info.value)


@pytest.mark.parametrize("model_type", ["glm", None, ["llama"]])
def test_a_type_that_is_not_in_the_table_has_no_entry(model_type: object) -> None:
    assert table_entry({"model_type": model_type}) is None


def test_an_adapter_on_a_layer_that_mlx_splits_is_rejected() -> None:
    rule = TABLE["deepseek_v3"]
    check_adaptable("model.layers.0.self_attn.o_proj", rule)
    with pytest.raises(SimPOError, match=r"embed_q cannot be converted .* split by heads; fuse"):
        check_adaptable("model.layers.0.self_attn.embed_q", rule)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama"}, ""),
        ({"model_type": "unknown"}, ""),
        ({"model_type": "gemma"}, "exact GELU"),
        ({"model_type": "phi3", "rope_scaling": {"type": "su"}}, "longrope"),
        ({"model_type": "phi3", "rope_parameters": {"rope_type": "longrope"}}, "longrope"),
        ({"model_type": "phi3", "rope_parameters": {"rope_type": ["longrope"]}}, ""),
    ],
    ids=str,
)
def test_known_deviations_from_transformers(config: dict, expected: str) -> None:
    reason = known_deviation(config)
    assert expected in reason
    assert bool(reason) == bool(expected)


def test_the_command_lists_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    ran = command(capsys, "convert", "architectures")
    assert ran.status == 0
    assert all(name in ran.out for name in TABLE)
    listed = command(capsys, "convert", "architectures", "--json").json
    assert listed.keys() == TABLE.keys()
    assert {name for name, entry in listed.items() if entry["refused"]} == UNSUPPORTED


def test_the_command_takes_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no settings" in complaint(command(capsys, "convert", "architectures", "lora.rank=3"))
