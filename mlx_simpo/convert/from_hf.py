"""A model from Hugging Face as an MLX model folder, with mlx-lm's own quantization."""

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
from .verify.compare import wanted
from .verify.proof import prove_converted

BITS = (2, 3, 4, 5, 6, 8)


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
    """Write a Hugging Face model in MLX's format, its rotary settings where mlx-lm finds them.

    Args:
        model: Hub id or folder. output: a new folder. quantize: bits of a weight (2, 3, 4, 5, 6 or
            8), in groups of ``group_size`` (32, 64 or 128); None leaves them as they are. dtype:
            "float32", "bfloat16" or "float16"; default: as stored. verify: compare logits
            (default: where the model fits into memory).

    Raises:
        SimPOError: no such model, one that mlx-lm cannot run, a failed verification. Nothing is
            written then.
    """
    display = display or Display()
    check_arguments(output, dtype)
    check_packing(quantize, group_size)
    base = Base(model, revision, trust_remote_code)
    loaded = base.load(dtype or "auto")
    if quantize is not None and "quantization" in loaded.config:
        raise SimPOError(f"{model} is quantized already; quantize the model that it was made of")
    verify = wanted(verify, loaded.model, display.note)
    with staged(output) as folder:
        config = dict(loaded.config)
        if quantize is not None:
            config = packed(loaded.model, config, quantize, group_size, display)
        elif dtype is not None:
            config |= dict.fromkeys([n for n in ("dtype", "torch_dtype") if n in config], dtype)
        weights = flat_arrays(loaded.model.parameters())
        if not verify:
            release(loaded.model)
        write_weights(folder, weights, "mlx")
        if not trust_remote_code:
            config.pop("auto_map", None)  # of code that does not go along
        save_config(config, folder / "config.json")
        copy_companions(loaded.folder, folder, None, trusted=trust_remote_code)
        found = prove_converted(folder, base, loaded.model, display) if verify else []
    return Conversion(local_path(output), found)


def check_packing(bits: int | None, group_size: int) -> None:
    """SimPOError for what MLX cannot pack."""
    if bits is not None and bits not in BITS:
        raise SimPOError(f"quantize is {bits}; it must be one of {', '.join(map(str, BITS))} bits")
    if group_size not in (32, 64, 128):
        raise SimPOError(f"group_size is {group_size}; it must be 32, 64 or 128")


def packed(model: nn.Module, config: dict, bits: int, group_size: int, display: Display) -> dict:
    """The configuration of the model after mlx-lm has quantized it in place."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):  # results alone go to stdout
        _, config = quantize_model(model, config, group_size, bits)
    if not any("scales" in layer for layer in model.modules()):
        raise SimPOError(
            f"no layer of this model can be packed in groups of {group_size}; use a smaller "
            "group_size, or leave quantize out"
        )
    display.note(said.getvalue().replace("[INFO] ", "").strip())
    return config
