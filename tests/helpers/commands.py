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
    """Return the settings of a run of three steps; those in ``more`` take their places."""
    settings = [
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
    ]
    changed = {word.partition("=")[0] for word in more}
    return [word for word in settings if word.partition("=")[0] not in changed] + list(more)


class Ran(NamedTuple):
    """The exit status and the output of a command."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output as one JSON object, by JSON's own rules (no NaN)."""
        value = json.loads(self.out, parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
        assert isinstance(value, dict)
        return value


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> Ran:
    """Run ``mlx-simpo`` with these arguments, in this process."""
    capsys.readouterr()
    try:
        status = run_command([str(a) for a in arguments])
    except SystemExit as exit:  # --help and --version
        status = int(exit.code or 0)
    captured = capsys.readouterr()
    return Ran(status, captured.out, captured.err)


def complaint(ran: Ran) -> str:
    """Return the error message of a command, after checking the one form that is allowed."""
    lines = ran.err.splitlines()
    start = "mlx-simpo: error: "
    assert ran.status == 2
    assert ran.out == ""
    assert lines[-1].startswith(start), ran.err
    assert sum("error:" in line[:40] for line in lines) == 1
    assert "Traceback" not in ran.err
    return lines[-1].removeprefix(start)


def changed_copy(folder: Path, copy: Path, **files: str | bytes | None) -> Path:
    """Copy ``folder`` with files replaced (config__json="…") or, if None, removed."""
    shutil.copytree(folder, copy)
    for name, content in files.items():
        path = copy / name.replace("__", ".")
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
    return copy


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object per line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def text_stream(content: str | bytes) -> io.TextIOWrapper:
    """Return standard input with this content."""
    return io.TextIOWrapper(io.BytesIO(content if isinstance(content, bytes) else content.encode()))


def captured_display(*, terminal: bool = False) -> tuple[Display, io.StringIO]:
    """Return a display, and what it has written so far."""
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=terminal, highlight=False)
    return Display(console), text


def load_arrays(file: Path) -> dict[str, mx.array]:
    """Return the content of a safetensors file as MLX arrays, each of which is read when used."""
    loaded = mx.load(str(file))
    assert isinstance(loaded, dict)
    return loaded


def arrays(file: Path) -> dict[str, np.ndarray]:
    """Return the content of a safetensors file as NumPy arrays."""
    return {name: np.array(value) for name, value in load_arrays(file).items()}


def assert_same_arrays(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Check that all arrays are the same, bit for bit."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(actual[name], value, err_msg=name)


def with_bad_rows(path: Path, good: int, bad_at: tuple[int, ...]) -> Path:
    """Write ``good`` records, and one without responses at each index of ``bad_at``."""
    rows: list[dict] = list(some_pairs(good))
    for index in bad_at:
        rows.insert(index, {"prompt": "no responses"})
    return write_jsonl(path, rows)
