"""A base model with an adapter merged into it, as a folder that other libraries load."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import save_config

from ..errors import SimPOError
from ..files import load_safetensors, weight_files
from ..model.adapters import flat_arrays, read_adapter_config
from ..model.loading import DTYPES
from ..model.record import RECORD_KEY, base_record, get_dict
from ..paths import local_path
from ..reporting.advice import adapter_mismatch
from ..reporting.display import Display
from .adapters import Conversion, base_name, check_arguments, write_record
from .base import (
    Base,
    architecture_of,
    checkpoint_layout,
    config_of,
    is_transformers_checkpoint,
)
from .folder import copy_companions, write_config, write_weights
from .merge import Fused, fused_model, release
from .staging import staged
from .verify.compare import should_verify
from .verify.proof import verify_fused
from .weights import Layout, checkpoint_tensors, source_names

FORMATS = ("hf", "mlx")


def fuse(
    output: str | Path,
    *,
    adapter: str | Path | None = None,
    model: str | None = None,
    revision: str | None = None,
    format: str = "hf",
    dequantize: bool | None = None,
    dtype: str | None = None,
    verify: bool | None = None,
    trust_remote_code: bool = False,
    display: Display | None = None,
) -> Conversion:
    """Write a base model with an mlx-lm adapter merged into its weights.

    Args:
        adapter: None for the base model alone.
        model: None for the one that the adapter's record names.
        format: "hf" (transformers' names, also for vLLM and llama.cpp's converter) or "mlx".
        dequantize: whether to dequantize a quantized base model, in float32 (the default); False
            quantizes the changed layers again, for "mlx" only.
        dtype: None for the base model's, or float32 if it is dequantized.

    The other arguments: see `mlx_simpo.convert`.

    Raises:
        SimPOError: an argument is not valid, the architecture is not converted, or the
            verification failed. Nothing is written then.
    """
    display = display or Display()
    check_arguments(output, dtype)
    if format not in FORMATS:
        raise SimPOError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    if adapter is None and model is None:
        raise SimPOError("--model is missing; name the model to write, or an adapter that names it")
    config = {} if adapter is None else read_adapter_config(adapter)
    record = get_dict(config, RECORD_KEY)
    base = Base(*base_name(model, revision, config.get("model"), record), trust_remote_code)
    loaded = base.load()
    display.warn(adapter_mismatch(record, loaded))
    quantization = loaded.config.get("quantization")
    check_quantization(quantization, format, dequantize, dtype, display)
    layout = checkpoint_layout(loaded, architecture_of(loaded)) if format == "hf" else None
    template = None if adapter is None else training_template(local_path(adapter))
    stays_quantized = bool(quantization) and dequantize is False
    precision = dtype or ("float32" if quantization and not stays_quantized else None)
    # Now, since writing releases the weights that it counts.
    verify = should_verify(verify, loaded.model, display.note)
    with staged(output) as folder:
        fused = fused_model(loaded, adapter, dequantize=not stays_quantized)
        if layout is not None:
            write_hf_model(folder, base, fused, layout, precision, display)
        else:
            write_mlx_model(folder, base, fused, precision, quantized=stays_quantized)
        copy_companions(loaded.folder, folder, template, trusted=trust_remote_code)
        if adapter is not None:
            write_record(folder, local_path(adapter), record, base_record(loaded))
        comparisons = verify_fused(folder, base, adapter, display) if verify else []
    return Conversion(local_path(output), comparisons)


def check_quantization(
    quantization: Any, format: str, dequantize: bool | None, dtype: str | None, display: Display
) -> None:
    """Check the options for a quantized base model, and note that it is dequantized if it is.

    Args:
        quantization: the base model's; empty or None if it is not quantized.

    Raises:
        SimPOError: an option does nothing, or asks for what the format cannot hold.
    """
    if not quantization:
        if dequantize is not None:
            raise SimPOError(
                "--quantize and --dequantize are for a quantized base model, but this base is not "
                "quantized; omit them (`convert from-hf --quantize` quantizes the result)"
            )
        return
    if dequantize is not False:
        display.note(
            f"the base model is quantized to {quantization.get('bits')} bits and is written "
            f"dequantized, in {dtype or 'float32'}: quantizing it again would round away most of "
            "what a short training changed"
        )
    elif format == "hf":
        raise SimPOError("transformers does not read MLX's quantized weights; use --format mlx")
    elif dtype is not None:
        raise SimPOError(f"dtype is {dtype}, but the weights stay quantized; omit it")


def training_template(adapter: Path) -> str | None:
    """Return the chat template in an adapter's folder; None if there is none.

    Raises:
        SimPOError: the file cannot be read.
    """
    path = adapter / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise SimPOError(f"cannot read {path}: {error}") from None


def write_hf_model(
    folder: Path, base: Base, fused: Fused, layout: Layout, dtype: str | None, display: Display
) -> None:
    """Write weights and config.json under transformers' names.

    Tensors that the adapter does not change are copied from the base model bit for bit, if its
    files use these names.

    Args:
        fused: its weights are released.
        dtype: of the weights; None for the base model's.
    """
    loaded = base.load()
    config = config_of(loaded)
    precision = dtype or loaded.dtype
    weights = flat_arrays(fused.model.parameters())
    renamed = not is_transformers_checkpoint(loaded)
    original = {} if renamed else load_safetensors(weight_files(loaded.folder))
    tensors = {n: t for n, t in original.items() if belongs_in_checkpoint(n, layout)}
    if not_run := sorted(tensors.keys() - layout.shapes.keys()):
        display.note(
            f"{len(not_run)} tensors that MLX does not run are copied unchanged, e.g. {not_run[0]}"
        )
    only = None if renamed else source_names(layout, fused.changed)
    new = checkpoint_tensors(weights, layout, only)
    tensors |= {n: t.astype(original[n].dtype) if n in original else t for n, t in new.items()}
    if dtype is not None or renamed:
        tensors = {name: cast_floats(tensor, precision) for name, tensor in tensors.items()}
    # write_weights frees each shard, unless something else still refers to its tensors.
    for references in (original, new, weights):
        references.clear()
    release(fused.model)
    write_weights(folder, tensors, "pt")
    write_config(folder, config, precision, trusted=base.trust_remote_code)


def belongs_in_checkpoint(name: str, layout: Layout) -> bool:
    """Whether to copy a tensor of the base model's checkpoint, even one that MLX does not use.

    Not copied are tied output layers, and rotary frequencies that old versions of transformers
    saved.
    """
    heads = ("lm_head.weight", "language_model.lm_head.weight")
    obsolete = name.endswith("rotary_emb.inv_freq") or name in heads
    return name in layout.shapes or not obsolete


def cast_floats(tensor: mx.array, dtype: str) -> mx.array:
    """Return the tensor in ``dtype`` if it holds floats; otherwise (packed weights) unchanged."""
    return tensor.astype(DTYPES[dtype]) if mx.issubdtype(tensor.dtype, mx.floating) else tensor


def write_mlx_model(
    folder: Path, base: Base, fused: Fused, dtype: str | None, *, quantized: bool
) -> None:
    """Write weights and config.json under MLX's names.

    Args:
        fused: its weights are released.
        dtype: of the weights; None for the base model's.
        quantized: whether the weights are.
    """
    loaded = base.load()
    precision = dtype or loaded.dtype
    weights = flat_arrays(fused.model.parameters())
    tensors = {name: cast_floats(array, precision) for name, array in weights.items()}
    weights.clear()
    release(fused.model)
    write_weights(folder, tensors, "mlx")
    config = dict(loaded.config)
    if not quantized:
        for name in ("quantization", "quantization_config"):
            config.pop(name, None)
    if not base.trust_remote_code:
        config.pop("auto_map", None)  # names code that is not copied
    save_config(config, folder / "config.json")
