"""A Hugging Face model as a folder in MLX's format, quantized by mlx-lm if asked for."""

import contextlib
import io
from pathlib import Path

import mlx.nn as nn
from mlx_lm.utils import quantize_model, save_config

from ..errors import SimPOError
from ..model.adapters import flat_arrays
from ..paths import local_path
from ..reporting.display import Display
from .adapters import Conversion, check_arguments
from .base import Base
from .folder import copy_companions, write_weights
from .merge import release
from .staging import staged
from .verify.compare import should_verify
from .verify.proof import verify_converted

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


def from_hf(
    model: str,
    output: str | Path,
    *,
    revision: str | None = None,
    quantize: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
    verify: bool | None = None,
    trust_remote_code: bool = False,
    display: Display | None = None,
) -> Conversion:
    """Write a Hugging Face model in MLX's format, with the rotary settings where mlx-lm reads them.

    Args:
        quantize: bits per weight (2, 3, 4, 5, 6 or 8); None does not quantize.
        group_size: weights that share a scale (32, 64 or 128).
        dtype: of weights that are not quantized.

    The other arguments: see `mlx_simpo.convert`.

    Raises:
        SimPOError: there is no such model, mlx-lm cannot run or quantize it, or the verification
            failed. Nothing is written then.
    """
    display = display or Display()
    check_arguments(output, dtype)
    check_bits(quantize, group_size)
    base = Base(model, revision, trust_remote_code)
    loaded = base.load(dtype or "auto")
    if quantize is not None and "quantization" in loaded.config:
        raise SimPOError(f"{model} is quantized already; quantize the model that it was made of")
    verify = should_verify(verify, loaded.model, display.note)
    with staged(output) as folder:
        config = dict(loaded.config)
        if quantize is not None:
            config = quantize_weights(loaded.model, config, quantize, group_size, display)
        elif dtype is not None:
            config |= dict.fromkeys([n for n in ("dtype", "torch_dtype") if n in config], dtype)
        weights = flat_arrays(loaded.model.parameters())
        if not verify:  # verification still needs them
            release(loaded.model)
        write_weights(folder, weights, "mlx")
        if not trust_remote_code:
            config.pop("auto_map", None)  # names code that is not copied
        save_config(config, folder / "config.json")
        copy_companions(loaded.folder, folder, None, trusted=trust_remote_code)
        comparisons = verify_converted(folder, base, loaded.model, display) if verify else []
    return Conversion(local_path(output), comparisons)


def check_bits(bits: int | None, group_size: int) -> None:
    """Check that MLX can quantize to this many bits in groups of this size.

    Raises:
        SimPOError: it cannot.
    """
    if bits is not None and bits not in BITS:
        raise SimPOError(f"quantize is {bits}; it must be one of {', '.join(map(str, BITS))} bits")
    if group_size not in GROUP_SIZES:
        raise SimPOError(f"group_size is {group_size}; it must be 32, 64 or 128")


def quantize_weights(
    model: nn.Module, config: dict, bits: int, group_size: int, display: Display
) -> dict:
    """Quantize a model with mlx-lm, in place, and return its new configuration.

    Raises:
        SimPOError: no layer can be quantized, because none has a multiple of group_size inputs.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):  # our stdout holds results alone
        _, config = quantize_model(model, config, group_size, bits)
    if not any("scales" in layer for layer in model.modules()):
        raise SimPOError(
            f"no layer of this model can be quantized in groups of {group_size}; use a smaller "
            "group_size, or omit quantize"
        )
    display.note(printed.getvalue().replace("[INFO] ", "").strip())
    return config
