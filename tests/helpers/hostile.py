"""What the tests of hostile input share: conversions by name, and inputs to spoil."""

import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlx_simpo.convert import from_hf, from_peft, fuse, to_peft

Spoil = Callable[[Path], Any]
Header = dict[str, Any]
SOURCE = {
    "to-peft": "mlx",
    "fuse": "mlx",
    "from-peft": "peft",
    "from-hf": "model",
    "alone": "model",
}
FILE = {
    "mlx": "adapters.safetensors",
    "peft": "adapter_model.safetensors",
    "model": "model.safetensors",
}
ADAPTER = "adapter_config.json"
conversions = pytest.mark.parametrize("name", SOURCE)


def convert(name: str, given: Path, output: Path, model: str | None, **options: Any) -> None:
    """Run a conversion of SOURCE; nothing may depend on the verification."""
    options = {"verify": False, **options}
    if name == "from-hf":
        from_hf(str(given), output, **options)
    elif name == "alone":
        fuse(output, model=str(given), **options)
    elif name == "fuse":
        fuse(output, adapter=given, model=model, **options)
    else:
        {"to-peft": to_peft, "from-peft": from_peft}[name](given, output, model=model, **options)


def content(folder: Path) -> dict[str, bytes | None]:
    """All that is in a folder; None for what is no ordinary file."""
    found = sorted(folder.rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in found}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Fail what takes longer; not with a TimeoutError, which counts as an OSError."""

    def stop(*_: object) -> None:
        pytest.fail(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def changed(file: str, **values: Any) -> Spoil:
    """Set entries of a JSON file."""

    def spoil(folder: Path) -> None:
        there = json.loads((folder / file).read_text("utf-8"))
        (folder / file).write_text(json.dumps(there | values))

    return spoil


LONG = 10**400  # JSON's numbers have no limit; floats have


def parts(content: bytes) -> tuple[Header, bytes]:
    """(header, data) of a safetensors file."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def first(header: Header, **changes: Any) -> Header:
    """The header with the entry of its first tensor changed."""
    name = next(n for n in header if n != "__metadata__")
    return header | {name: header[name] | changes}


def file_of(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file; ``length``: what it claims of its header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


models = pytest.mark.parametrize("name", ["from-hf", "alone"])
SETTINGS = "tokenizer_config.json"


def program(folder: Path, *arguments: str, answer: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``mlx-simpo`` in a process of its own, with 4 GB of memory where that can be had."""
    limit = "import resource as r; r.setrlimit(r.RLIMIT_AS, (4 << 30, 4 << 30)); "
    run = "import sys; from mlx_simpo.cli.main import run_command; sys.exit(run_command(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", limit * (sys.platform == "linux") + run, *arguments],
        cwd=folder,
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules")},
        input=answer,
        capture_output=True,
        text=True,
        timeout=60,
    )


CONFIG = "config.json"


def nested(**values: Any) -> Spoil:
    """Set entries of lora_parameters."""

    def spoil(folder: Path) -> None:
        there = json.loads((folder / ADAPTER).read_text("utf-8"))
        changed(ADAPTER, lora_parameters=there["lora_parameters"] | values)(folder)

    return spoil
