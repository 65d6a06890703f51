"""The machine: chip, memory, system, versions, and what macOS's GPU watchdog may do."""

import os
import platform
import sys
from importlib.metadata import version

import mlx.core as mx

from ..device import is_gpu, memory_limit_bytes, processor, total_memory_bytes

PACKAGES = ("mlx-simpo", "mlx", "mlx-lm")
# What MLX puts into one command buffer at most, and a switch of Apple's driver that Apple does not
# document; docs/troubleshooting.md says what is known of them.
WATCHDOG_VARIABLES = (
    "MLX_MAX_OPS_PER_BUFFER",
    "MLX_MAX_MB_PER_BUFFER",
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT",
)


def machine() -> dict[str, str]:
    """Return chip, memory, system and versions, in words."""
    description = {
        "chip": processor(),
        "memory": f"{total_memory_bytes() / 2**30:.0f} GiB",
        "system": system(),
        "processor": platform.machine(),
        "MLX's device": str(mx.default_device()),
    }
    if is_gpu():
        info = mx.device_info()
        description["GPU architecture"] = str(info.get("architecture", "unknown"))
        description["memory for MLX"] = f"{memory_limit_bytes() / 2**30:.1f} GiB"
    description["Python"] = platform.python_version()
    description |= {name: version(name) for name in PACKAGES}
    return description | ({"GPU watchdog": gpu_watchdog()} if sys.platform == "darwin" else {})


def system() -> str:
    """Return the operating system with its version: "macOS 15.5"."""
    macos = platform.mac_ver()[0]
    return f"macOS {macos}" if macos else f"{platform.system()} {platform.release()}"


def gpu_watchdog() -> str:
    """Return what a Mac's owner should know of macOS's GPU watchdog, and what is set against it."""
    values = (f"{name} is {os.environ.get(name, 'not set')}" for name in WATCHDOG_VARIABLES)
    return (
        "macOS may end a run while the display is on, with “Impacting Interactivity” (see "
        f"docs/troubleshooting.md); {', '.join(values)}"
    )
