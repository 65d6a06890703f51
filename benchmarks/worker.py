"""One library in a process of its own: python worker.py LIBRARY SPEC, then batches on stdin.

(python worker.py --requirements prints what all of them need from PyPI.)

Reads one JSON list of pairs per line, runs one optimizer step on it, and writes one JSON object per
line: what the library's adapter returns, seconds, peak memory of MLX and of the process.
"""

import ast
import contextlib
import importlib.util
import json
import resource
import sys
import time
from pathlib import Path
from types import ModuleType


def library(name: str) -> ModuleType:
    """benchmarks/libraries/<name>.py, under a name that hides no package."""
    path = Path(__file__).parent / "libraries" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"library_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def requirements() -> list[str]:
    """What the adapters name in REQUIRES, read without importing what they need."""
    required: list[str] = []
    for path in sorted((Path(__file__).parent / "libraries").glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REQUIRES":
                required += ast.literal_eval(node.value)
    return required


def main() -> None:
    if sys.argv[1:] == ["--requirements"]:
        print(*requirements())
        return
    name, spec = sys.argv[1], json.loads(sys.argv[2])
    results = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):  # the libraries print
        try:
            step = library(name).prepare(spec)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=results)
            return
        print(json.dumps({"ready": True}), file=results, flush=True)
        for line in sys.stdin:
            print(json.dumps(measured(step, json.loads(line))), file=results, flush=True)


def measured(step, batch: list) -> dict:
    torch = sys.modules.get("torch") if "mlx.core" not in sys.modules else None
    if torch is None:
        import mlx.core as mx

        mx.clear_cache()
        mx.reset_peak_memory()
    started = time.perf_counter()
    try:
        result = step(batch)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    result["seconds"] = time.perf_counter() - started
    if torch is None:
        result["peak_gb"] = mx.get_peak_memory() / 1e9
        mx.clear_cache()
    unit = 1 if sys.platform == "darwin" else 1024
    result["process_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    return result


if __name__ == "__main__":
    main()
