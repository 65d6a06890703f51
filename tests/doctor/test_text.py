"""The report as text: every line fits, and what has failed can be seen."""

from typing import Any

import pytest

from mlx_simpo.doctor.text import WIDTH, as_text

OPERATION = {
    "name": "delta rule, 16/32 heads of size 128 with a decay for each entry in bfloat16",
    "dtype": "bfloat16",
    "value_error": 1.2e-3,
    "gradient_error": None,
    "tolerance": 0.04,
    "problem": None,
    "where": "",
    "passed": True,
    "fused_gradient": True,
}
EQUALITY = {
    "attention": "mlx",
    "checkpointing": True,
    "dtype": "float32",
    "error": 2e-6,
    "gradient_error": 1.5e-5,
    "tolerance": 1e-4,
    "gradient_tolerance": 1e-3,
    "problem": None,
    "passed": True,
}
STEP = {"variant": "ours, attention mlx", "seconds": 0.1234, "tokens_per_second": 123456.7}
STEP |= {"peak_gb": 12.345, "positions": 1, "micro_batches": 1}
LONG = "mx.fast.something failed because " + "of many things " * 20


def lines_of(**values: Any) -> list[str]:
    lines = as_text(values).splitlines()
    assert max(map(len, lines)) <= WIDTH == 80
    return lines


def test_a_table_of_operations() -> None:
    lines = lines_of(operations=[OPERATION])
    assert (
        "  1.2e-03         -    yes  ok, delta rule, 16/32 heads of size 128 with a decay" in lines
    )
    assert lines[-1] == "  allowed: 4.0e-02 in bfloat16"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"where": "the gradient of keys, 41 queries"}, "FAILED, delta rule"),
        ({"where": "the gradient of keys, 41 queries"}, "41 queries"),
        ({"problem": LONG}, "mx.fast.something"),
    ],
)
def test_an_operation_that_fails(change: dict[str, Any], words: str) -> None:
    text = "\n".join(lines_of(operations=[OPERATION | {"passed": False} | change]))
    assert words in text


def test_a_table_of_engines() -> None:
    failed = EQUALITY | {"passed": False, "error": None}
    broken = EQUALITY | {"passed": False, "error": None, "problem": LONG}
    lines = lines_of(equality=[EQUALITY, failed, broken])
    assert "     2.0e-06        1.5e-05  ok, attention mlx, checkpointing" in lines
    assert "           -        1.5e-05  FAILED, attention mlx, checkpointing" in lines
    assert any(line.startswith("  FAILED: attention mlx, checkpointing: mx.fast") for line in lines)
    assert lines[-1] == "     1.0e-04        1.0e-03  allowed in float32"


def test_a_table_of_steps() -> None:
    lines = lines_of(steps=[STEP, {"variant": "reference", "problem": LONG}])
    assert "     0.123   123,457    12.35  ours, attention mlx" in lines
    assert any(line.startswith("  reference: FAILED: mx.fast.something") for line in lines)


def test_a_calibration() -> None:
    row = {"tokens": 4096, "pairs": 1, "seconds_per_pair": 12.5, "pairs_per_hour": 288.0}
    table = [row | {"is_extrapolated": True}]
    report = {"note": "measured in 2.9 s: …", "table": table, "is_complete": True, "is_used": True}
    lines = lines_of(calibration=report)
    assert lines[0] == "calibration: measured in 2.9 s: …"
    assert (
        lines[-1] == "      4096              12.5             288  longer than what was measured"
    )
    assert "a run on a CPU keeps the built-in numbers" not in "".join(lines)
    lines = lines_of(calibration=report | {"is_used": False})
    assert "  only for the times below: a run on a CPU keeps the built-in numbers" in lines
    lines = lines_of(calibration={"note": LONG, "table": []})
    assert lines[0].startswith("calibration: mx.fast")
    assert lines[-1].startswith("  too little was measured to predict times; try again")
    assert lines_of(calibration={"problem": LONG})[0].startswith("calibration: FAILED: mx.fast")


def test_what_is_only_for_programs_is_not_shown() -> None:
    assert as_text({"implementation": "kernel"}) == ""
