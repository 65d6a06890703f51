"""Runs tests against wrong versions, each in a fork of a process that has imported MLX and pytest.

    python benchmarks/mutation/worker.py COPY

COPY is a private copy of the repository. Lines of JSON come in: {"module", "code", "tests",
"seconds"}; one goes out for each: {"outcome", "by", "seconds"}. A module is put back afterwards.
"""

import json
import os
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

MEMORY = 20 * 1024**3  # that is written: a wrong size must not take the machine down
# Libraries with a plugin of pytest are imported before it, which it warns of.
OPTIONS = ["-x", "-q", "--no-header", "-p", "no:cacheprovider"]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+?)(?:\[|\s|$)", re.MULTILINE)


def import_libraries(copy: Path) -> None:
    """Import what the tests need, except the package itself."""
    sys.path.insert(0, str(copy))
    import mlx_simpo  # noqa: F401 — first: on a Linux CPU it loads a fast BLAS in place of MLX's own

    # isort: split
    import datasets  # noqa: F401
    import hypothesis  # noqa: F401
    import mlx_lm.tuner.lora  # noqa: F401
    import numpy  # noqa: F401
    import pytest  # noqa: F401
    import transformers  # noqa: F401

    for name in [name for name in sys.modules if name.split(".")[0] == "mlx_simpo"]:
        del sys.modules[name]


def run_tests(tests: list[str], log: Path, *, is_wrong: bool) -> None:
    """Run the tests in this process and end it with pytest's exit status."""
    import pytest

    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    sys.dont_write_bytecode = is_wrong  # what is compiled must not outlive the wrong version
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    status = 70
    try:
        status = pytest.main([*OPTIONS, *tests])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended_within(process: int, seconds: float) -> int | None:
    """Return the process's exit status, or None after killing it and what it started."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        finished, status = os.waitpid(process, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None


def tested(job: dict[str, Any], log: Path) -> dict[str, Any]:
    """Return how the tests end: passed, failed, slow or none (nothing was run)."""
    start = time.monotonic()
    process = os.fork()
    if not process:
        run_tests(job["tests"], log, is_wrong=job["code"] is not None)
    status = ended_within(process, job["seconds"])
    seconds = round(time.monotonic() - start, 1)
    text = log.read_text(errors="replace")
    by = FAILED.search(text)
    outcome = {None: "slow", 0: "passed", 5: "none", 4: "none"}.get(status, "failed")
    return {
        "outcome": outcome,
        "by": by[1] if by else None,
        "seconds": seconds,
        "tail": text[-1500:] if outcome == "none" or job["code"] is None else "",
    }


def main() -> None:
    copy = Path(sys.argv[1]).resolve()
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import_libraries(copy)
    with tempfile.TemporaryDirectory() as scratch:
        for line in sys.stdin:
            job = json.loads(line)
            module = copy / job["module"]
            original = module.read_text(encoding="utf-8")
            try:
                if job["code"] is not None:
                    module.write_text(job["code"], encoding="utf-8")
                    Path(cache_from_source(str(module))).unlink(missing_ok=True)
                result = tested(job, Path(scratch, "log"))
            finally:
                module.write_text(original, encoding="utf-8")
            replies.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
