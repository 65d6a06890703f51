"""Errors of MLX that are about memory or about the GPU's time, as messages that help.

What MLX 0.32.4 raises, by its source (mlx/backend/*/allocator.cpp, mlx/backend/metal/device.cpp):

- Metal: ``[malloc] Unable to allocate``, ``[metal::malloc] Attempting to allocate`` (more than one
  buffer may have) and ``[metal::malloc] Resource limit`` (too many buffers) when memory is
  requested; ``[METAL] Command buffer execution failed: Insufficient Memory`` when a command has
  failed. That is raised where the result is waited for; it ended the process before MLX's #3523.
- CUDA: ``cudaMallocAsync(…) failed: out of memory``.
- A CPU: nothing. MLX does not look at what malloc returns, and writes to address 0 (a segmentation
  fault) where the address space is limited (ulimit -v); elsewhere Linux grants the memory and ends
  the process when it is used. mx.set_memory_limit changes neither: it only makes MLX wait for
  running operations. Numpy and Python raise MemoryError.
"""

from ..errors import SimPOError, one_line
from .memory import MemoryForecast

OUT_OF_MEMORY = (
    "unable to allocate",
    "[metal::malloc]",
    "insufficient memory",
    "callbackerroroutofmemory",
    "out of memory",
)
# macOS ends commands that keep the GPU from drawing the screen; CUDA has a limit on such GPUs too.
WATCHDOG = (
    "impacting interactivity",
    "callbackerrorimpactinginteractivity",
    "gpu timeout",
    "callbackerrortimeout",
    "gpu hang",
    "callbackerrorhang",
    "the launch timed out",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an exception means that memory was not enough."""
    return isinstance(error, MemoryError) or _mentions(error, OUT_OF_MEMORY)


def is_watchdog(error: BaseException) -> bool:
    """Return whether an exception means that the system has stopped a command of the GPU because
    it took too long."""
    return _mentions(error, WATCHDOG)


def explain(error: BaseException, forecast: MemoryForecast | None = None) -> SimPOError | None:
    """Return what to do about an error of MLX in training; None if it is of another kind.

    Args:
        forecast: of this training, if there is one; its figures are part of the message.
    """
    reason = one_line(error, 200) or type(error).__name__
    size = "" if forecast is None else f"; the forecast for training was {forecast.figures}"
    lower = "set train.max_tokens_per_step to half of a micro-batch's positions, or less"
    if forecast is not None:
        tokens = max(1, forecast.positions // 2)
        lower = f"set train.max_tokens_per_step={tokens} or less"
    if is_watchdog(error):
        return SimPOError(
            f"the system stopped the GPU, because one of MLX's commands took too long ({reason}"
            f"{size}); for shorter commands, {lower}, and leave the GPU to this program"
        )
    if is_out_of_memory(error):
        return SimPOError(
            f"not enough memory ({reason}{size}); {lower}, then "
            "train.gradient_checkpointing=true; other programs may be using the memory"
        )
    return None


def _mentions(error: BaseException, phrases: tuple[str, ...]) -> bool:
    """Return whether an error of MLX contains one of these phrases, in any case."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(phrase in text for phrase in phrases)
