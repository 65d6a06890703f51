"""What the tests of hostile input share: conversions by name, and ways to corrupt their input."""

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

Corrupt = Callable[[Path], Any]  # changes an input folder in place
Reject = Callable[..., str]  # the fixture `reject`: the message of a conversion that fails
Header = dict[str, Any]  # of a safetensors file, as JSON
# Each conversion and the folder of the fixture `valid_inputs` that it reads. "fuse" merges an
# adapter; "fuse-model" rewrites a model without one.
SOURCE = {
    "to-peft": "mlx",
    "fuse": "mlx",
    "from-peft": "peft",
    "from-hf": "model",
    "fuse-model": "model",
}
WEIGHTS = {
    "mlx": "adapters.safetensors",
    "peft": "adapter_model.safetensors",
    "model": "model.safetensors",
}
ADAPTER_CONFIG = "adapter_config.json"
MODEL_CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
HUGE_INTEGER = 10**400  # JSON sets no limit to numbers; floats have one

every_conversion = pytest.mark.parametrize("conversion", SOURCE)
model_conversions = pytest.mark.parametrize("conversion", ["from-hf", "fuse-model"])


def convert(
    conversion: str, source: Path, output: str | Path, model: str | None, **options: Any
) -> None:
    """Run a conversion of SOURCE, without verification unless ``options`` say so: nothing may rely
    on verification alone to reject an input."""
    options = {"verify": False, **options}
    if conversion == "from-hf":
        from_hf(str(source), output, **options)
    elif conversion == "fuse-model":
        fuse(output, model=str(source), **options)
    elif conversion == "fuse":
        fuse(output, adapter=source, model=model, **options)
    else:
        function = {"to-peft": to_peft, "from-peft": from_peft}[conversion]
        function(source, output, model=model, **options)


def assert_mentions(message: str, *parts: str) -> None:
    """Assert that a message has all of these parts, in any order and whatever stands between."""
    missing = [part for part in parts if part not in message]
    assert not missing, f"{missing} not in the message: {message[:600]}"


def folder_content(folder: Path) -> dict[str, bytes | None]:
    """Return the bytes of every file below a folder; None for what is not an ordinary file."""
    paths = sorted(folder.rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Fail the test if the block takes longer."""

    def stop(*_: object) -> None:
        # Not a TimeoutError: that is an OSError, which the code under test may catch.
        pytest.fail(f"still running after {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def set_json(file: str, **values: Any) -> Corrupt:
    """Return a function that sets entries of a JSON file in a folder."""

    def corrupt(folder: Path) -> None:
        content = json.loads((folder / file).read_text("utf-8"))
        (folder / file).write_text(json.dumps(content | values))

    return corrupt


def set_lora_parameters(**values: Any) -> Corrupt:
    """Return a function that sets entries of an mlx-lm adapter's lora_parameters."""

    def corrupt(folder: Path) -> None:
        content = json.loads((folder / ADAPTER_CONFIG).read_text("utf-8"))
        parameters = content["lora_parameters"] | values
        set_json(ADAPTER_CONFIG, lora_parameters=parameters)(folder)

    return corrupt


def split_safetensors(content: bytes) -> tuple[Header, bytes]:
    """Split the bytes of a safetensors file into its header and its data."""
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """Return the bytes of a safetensors file.

    Args:
        header: to be written as JSON, or the bytes themselves.
        length: what the file claims of its header's length; None for the truth.
    """
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def change_first_tensor(header: Header, **changes: Any) -> Header:
    """Return the header with the entry of its first tensor changed."""
    name = next(n for n in header if n != "__metadata__")
    return header | {name: header[name] | changes}


def run_program(folder: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run ``mlx-simpo`` in a process of its own, on Linux with 4 GB of memory at most."""
    limit = "import resource as r; r.setrlimit(r.RLIMIT_AS, (4 << 30, 4 << 30)); "
    run = "import sys; from mlx_simpo.cli.main import run_command as r; sys.exit(r(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", limit * (sys.platform == "linux") + run, *arguments],
        cwd=folder,
        env=os.environ | {"HF_MODULES_CACHE": str(folder / "modules")},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
    )
