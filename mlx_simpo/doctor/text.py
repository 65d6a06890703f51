"""The report as text of at most 80 columns, to read and to paste into an issue."""

import textwrap
from collections.abc import Callable, Mapping
from typing import Any

WIDTH = 80


def as_text(values: Mapping[str, Any]) -> str:
    """Return the lines for a part's values; those that are only for programs have none."""
    lines = [line for key, value in values.items() if key in _LINES for line in _LINES[key](value)]
    if "model_type" in values:
        lines = ["", *_wrapped(_model(values)), *lines]
    return "".join(f"{line}\n" for line in lines)


def _wrapped(text: str) -> list[str]:
    """Return a sentence as lines, of which all but the first are indented."""
    return textwrap.wrap(
        text,
        WIDTH,
        subsequent_indent=" " * (len(text) - len(text.lstrip()) + 2),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _row(numbers: str, text: str) -> list[str]:
    """Return a line of a table; text that is too long goes on below, behind the numbers."""
    indent = " " * (len(numbers) + 2)
    lines = textwrap.wrap(text, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False)
    return [f"{numbers}  {lines[0]}", *(f"{indent}{line}" for line in lines[1:])]


def _machine(machine: dict[str, str]) -> list[str]:
    return [line for name, value in machine.items() for line in _wrapped(f"{name}: {value}")]


def _checks(checks: list[dict[str, Any]]) -> list[str]:
    failed = [c for c in checks if not c["passed"]]
    worst = max(c["error"] for c in checks if c["dtype"] == "float32")
    lines = _wrapped(
        f"checks: {len(checks) - len(failed)} of {len(checks)} passed; the largest float32 error "
        f"is {worst:.1e} nats, compared with float64"
    )
    for c in failed:
        lines += _wrapped(
            f"  FAILED: {c['dtype']}, vocabulary {c['vocabulary']}, softcap {c['softcap']}: error "
            f"{c['error']:.2e} (plain operations: {c['plain_error']:.2e}), gradient error "
            f"{c['gradient_error']:.2e} (plain operations: {c['plain_gradient_error']:.2e})"
        )
    return lines


def _timings(timings: list[dict[str, Any]]) -> list[str]:
    first = timings[0]
    head = (
        f"time for value and gradient of {first['rows']} rows of {first['vocabulary']} logits "
        f"({first['dtype']}):"
    )
    return _wrapped(head) + [
        f"  {t['milliseconds']:8.2f} ms {t['gb_per_second']:7.1f} GB/s  {t['method']}"
        for t in timings
    ]


def _model(model: Mapping[str, Any]) -> str:
    kind = f"{model['model_type']}, {model['layers']} layers, {model['dtype']}"
    return f"model: {model['name']} ({kind})"


def _pairs(pairs: dict[str, Any]) -> list[str]:
    lengths = pairs["lengths"]
    totals = [p["prompt"] + p[name] for p in lengths for name in ("chosen", "rejected")]
    return _wrapped(
        f"a step: {len(lengths)} pairs with sequences of {min(totals)} to {max(totals)} tokens, "
        f"{pairs['tokens']:,} in all; LoRA rank {pairs['lora_rank']}"
    )


def _calibration(calibration: dict[str, Any]) -> list[str]:
    if "problem" in calibration:
        return _wrapped(f"calibration: FAILED: {calibration['problem']}")
    lines = _wrapped(f"calibration: {calibration['note']}")
    if not calibration["table"]:
        lack = "too little was measured to predict times; try again when nothing else runs"
        return [*lines, *_wrapped(f"  {lack}")]
    if calibration["is_complete"] and not calibration["is_used"]:
        lines += _wrapped("  only for the times below: a run on a CPU keeps the built-in numbers")
    lines += _wrapped("predicted times of training, by the tokens of each of a pair's sequences:")
    lines.append("    tokens  seconds per pair  pairs per hour")
    for row in calibration["table"]:
        longer = "longer than what was measured" if row["is_extrapolated"] else ""
        numbers = f"{row['tokens']:>10}{row['seconds_per_pair']:>18.3g}"
        lines += [f"{numbers}{row['pairs_per_hour']:>16,.0f}  {longer}".rstrip()]
    return lines


def _engine(engine: dict[str, Any]) -> list[str]:
    return _wrapped(f"engine: {engine['note']}")


def _operations(checks: list[dict[str, Any]]) -> list[str]:
    lines = _wrapped(
        "MLX's own operations beside ours, the largest differences in relation to the largest "
        "entry; and whether MLX has a fused gradient:"
    )
    lines.append("    value  gradient  fused")
    for check in checks:
        errors = [_number(check[name]) for name in ("value_error", "gradient_error")]
        is_fused = "yes" if check["fused_gradient"] else "no"
        failure = "" if check["passed"] else f": {check['problem'] or check['where']}"
        lines += _row(
            f"{errors[0]:>9}{errors[1]:>10}{is_fused:>7}",
            f"{'ok' if check['passed'] else 'FAILED'}, {check['name']}{failure}",
        )
    limits = dict.fromkeys((check["dtype"], check["tolerance"]) for check in checks)
    allowed = ", ".join(f"{limit:.1e} in {dtype}" for dtype, limit in limits)
    return [*lines, *_wrapped(f"  allowed: {allowed}")]


def _equality(checks: list[dict[str, Any]]) -> list[str]:
    first = checks[0]
    lines = [
        "compared with the reference engine, the largest differences:",
        "  nats/token  LoRA gradient",
    ]
    for check in checks:
        checkpointing = ", checkpointing" if check["checkpointing"] else ""
        way = f"attention {check['attention']}{checkpointing}"
        if check["problem"]:
            lines += _wrapped(f"  FAILED: {way}: {check['problem']}")
            continue
        lines += _row(
            f"{_number(check['error']):>12}{_number(check['gradient_error']):>15}",
            f"{'ok' if check['passed'] else 'FAILED'}, {way}",
        )
    return [
        *lines,
        f"{first['tolerance']:>12.1e}  {first['gradient_tolerance']:>13.1e}  allowed in "
        f"{first['dtype']}",
    ]


def _number(number: float | None) -> str:
    return "-" if number is None else f"{number:.1e}"


def _steps(steps: list[dict[str, Any]]) -> list[str]:
    lines = [
        "seconds of a step (median), tokens of both sequences, peak memory:",
        "   seconds  tokens/s  peak GB",
    ]
    for step in steps:
        if "problem" in step:
            lines += _wrapped(f"  {step['variant']}: FAILED: {step['problem']}")
            continue
        lines += _row(
            f"{step['seconds']:>10.3g}{step['tokens_per_second']:>10,.0f}{step['peak_gb']:>9.2f}",
            step["variant"],
        )
    return lines


_LINES: dict[str, Callable[[Any], list[str]]] = {
    "machine": _machine,
    "problem": lambda problem: _wrapped(f"problem: {problem}"),
    "reason": lambda reason: _wrapped(f"log-probabilities: {reason}"),
    "checks": _checks,
    "timings": _timings,
    "calibration": _calibration,
    "engine": _engine,
    "pairs": _pairs,
    "operations": _operations,
    "equality": _equality,
    "steps": _steps,
}
