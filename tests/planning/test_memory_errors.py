"""Errors about memory and about the GPU's time, as MLX 0.32 words them."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_simpo import SimPOError
from mlx_simpo.planning.memory import MemoryForecast
from mlx_simpo.planning.memory_errors import explain, is_out_of_memory, is_watchdog

FAILED = "[METAL] Command buffer execution failed: "
OUT_OF_MEMORY = [
    RuntimeError("[malloc] Unable to allocate 68719476736 bytes."),
    RuntimeError(
        "[metal::malloc] Attempting to allocate 68719476736 bytes which is greater than the "
        "maximum allowed buffer size of 17179869184 bytes."
    ),
    RuntimeError("[metal::malloc] Resource limit (499000) exceeded."),
    RuntimeError(
        f"{FAILED}Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)."
    ),
    RuntimeError("cudaMallocAsync(&data, size, stream) failed: out of memory"),
    MemoryError(),
    MemoryError("Unable to allocate 2.24 GiB for an array with shape (300000000,)"),
]
WATCHDOG = [
    RuntimeError(
        f"{FAILED}Impacting Interactivity "
        "(0000000e:kIOGPUCommandBufferCallbackErrorImpactingInteractivity)."
    ),
    RuntimeError(
        f"{FAILED}Caused GPU Timeout Error (00000002:kIOGPUCommandBufferCallbackErrorTimeout)."
    ),
    RuntimeError(f"{FAILED}Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)."),
    RuntimeError("cudaStreamSynchronize failed: the launch timed out and was terminated"),
]
OTHER = [
    RuntimeError("[matmul] Last dimension of first input must match"),
    ValueError("[reshape] Cannot reshape array of size 6"),
    SimPOError("out of memory"),
    KeyboardInterrupt(),
]
FORECAST = MemoryForecast(9_300_000_000, 10_000_000_000, 4_200_000_000, 4096, 8, "train.jsonl:17")


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *WATCHDOG, *OTHER], ids=repr)
def test_errors_are_told_apart(error: BaseException) -> None:
    assert is_out_of_memory(error) == (error in OUT_OF_MEMORY)
    assert is_watchdog(error) == (error in WATCHDOG)


@pytest.mark.parametrize("error", OTHER, ids=repr)
def test_other_errors_are_not_explained(error: BaseException) -> None:
    assert explain(error, FORECAST) is None


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_what_to_lower_has_the_forecasts_figures(error: BaseException) -> None:
    text = str(explain(error, FORECAST))
    assert text.startswith(f"not enough memory ({str(error) or 'MemoryError'}; the forecast for")
    assert "about 9.3 GB of 10 GB (the weights take 4.2 GB" in text
    assert "set train.max_tokens_per_step=2048 or less, then train.gradient_checkpointing" in text
    assert "\n" not in text


def test_without_a_forecast_the_message_has_no_figures() -> None:
    assert str(explain(OUT_OF_MEMORY[0])) == (
        "not enough memory ([malloc] Unable to allocate 68719476736 bytes.); set "
        "train.max_tokens_per_step to half of a micro-batch's positions, or less, then "
        "train.gradient_checkpointing=true; other programs may be using the memory"
    )


@pytest.mark.parametrize("error", WATCHDOG, ids=repr)
def test_the_watchdog_is_explained(error: BaseException) -> None:
    text = str(explain(error, FORECAST))
    assert text.startswith("the system stopped the GPU, because one of MLX's commands took too")
    assert "for shorter commands, set train.max_tokens_per_step=2048 or less" in text
    assert "other programs may" not in text


# --- a process with little memory --------------------------------------------------------------

# In the child: 300 MB of address space beyond what it has, as with `ulimit -v`.
CHILD = """
import resource
import mlx_simpo
import mlx.core as mx, mlx.nn as nn
from pathlib import Path
from mlx_simpo.device import memory_limit_bytes
from mlx_simpo import MemoryConfig
from mlx_simpo.planning.memory import check_weights
mx.eval(mx.ones(1))
mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (mapped + 300_000_000, resource.RLIM_INFINITY))
model = nn.Linear(20_000, 20_000, bias=False)  # 1.6 GB
"""


def run_child(code: str) -> "subprocess.CompletedProcess[str]":
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, "-c", CHILD + code],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )


only_on_linux_cpu = pytest.mark.skipif(
    sys.platform != "linux" or mx.default_device().type != mx.cpu,
    reason="about MLX's allocator for Linux CPUs",
)


@only_on_linux_cpu
@pytest.mark.parametrize("first", ["", "mx.set_memory_limit(100_000_000)"])
def test_on_a_cpu_mlx_raises_nothing_when_memory_is_not_enough(first: str) -> None:
    """If this fails, MLX has learned to raise: `is_out_of_memory` has to know its message."""
    code = f"""
{first}
try:
    mx.eval(model.parameters())
except BaseException as error:
    print(type(error), error)
"""
    child = run_child(code)
    assert child.returncode < 0, child.stdout + child.stderr  # ended by a signal
    assert child.stdout == ""


@only_on_linux_cpu
def test_the_check_ends_with_a_message_where_mlx_would_crash() -> None:
    code = """
assert 250_000_000 < memory_limit_bytes() < 310_000_000, memory_limit_bytes()
try:
    check_weights(model, MemoryConfig())
except mlx_simpo.SimPOError as error:
    print(error)
"""
    child = run_child(code)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith("not enough memory: the model's weights take 1.6 GB of 0.")
