"""Small runs on the tiny model, in this process: from settings, or as a command with its output."""

import io
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest
from helpers.tiny import some_pairs, write_jsonl
from rich.console import Console

from mlx_simpo.cli.main import run_command
from mlx_simpo.reporting.display import Display


def small_run(model: Path, pairs: Path, output: Path, *more: str) -> list[str]:
    """Settings of a run of three steps; what comes in ``more`` wins."""
    return [
        f"model={model}",
        f"data.train={pairs}",
        f"output={output}",
        "data.valid_fraction=0.2",
        "lora.rank=2",
        "train.batch_size=2",
        "train.gradient_accumulation_steps=2",
        "train.learning_rate=1e-2",
        "train.warmup_ratio=0",
        "train.steps=3",
        *more,
    ]


class Ran(NamedTuple):
    """What a command came to."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as one JSON object, as JSON's own rules have it (no NaN)."""
        value = json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        assert isinstance(value, dict)
        return value


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    """Run ``mlx-simpo`` with these arguments."""
    capsys.readouterr()
    try:
        status = run_command([str(a) for a in arguments])
    except SystemExit as ended:  # --help, --version and argparse's own errors
        status = int(ended.code or 0)
    captured = capsys.readouterr()
    return Ran(status, captured.out, captured.err)


def complaint(ran: Ran) -> str:
    """The message of a command that refused its input, in the one form that is allowed."""
    lines = ran.err.splitlines()
    begins = "mlx-simpo: error: "
    assert ran.status == 2
    assert ran.out == ""
    assert lines[-1].startswith(begins), ran.err
    assert sum("error:" in line[:40] for line in lines) == 1
    assert "Traceback" not in ran.err
    return lines[-1].removeprefix(begins)


def changed_copy(folder: Path, copy: Path, **files: str | bytes | None) -> Path:
    """A copy of ``folder`` with files replaced (config__json="…") or, where None, left out."""
    shutil.copytree(folder, copy)
    for name, content in files.items():
        path = copy / name.replace("__", ".")
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return copy


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def captured_display(*, terminal: bool = False) -> tuple[Display, io.StringIO]:
    """A report, and what it has written so far."""
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=terminal, highlight=False)
    return Display(console), text


def arrays(file: Path) -> dict[str, np.ndarray]:
    """The content of a safetensors file."""
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return {name: np.array(value) for name, value in loaded.items()}


def assert_same_arrays(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Bit for bit."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def with_bad_rows(path: Path, good: int, bad_at: tuple[int, ...]) -> Path:
    """Good records, with a record that has no answers in each row of ``bad_at``."""
    rows: list[dict] = list(some_pairs(good))
    for place in bad_at:
        rows.insert(place, {"prompt": "no answers"})
    return write_jsonl(path, rows)
