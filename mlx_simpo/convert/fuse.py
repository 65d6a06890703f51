"""A model with its adapter merged in, as a folder that other libraries load."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import save_config

from ..errors import SimPOError
from ..files import load_safetensors, weight_files
from ..model.adapters import flat_arrays, read_adapter_config
from ..model.loading import DTYPES
from ..model.record import RECORD_KEY, base_record, differences_from_training, get_dict
from ..paths import local_path
from ..reporting.display import Display
from .adapters import Conversion, base_name, check_arguments, write_record
from .base import Base, architecture, config_of, is_plain, layout_of
from .folder import copy_companions, write_config, write_weights
from .merge import Fused, fused_model, release
from .staging import staged
from .verify.compare import wanted
from .verify.proof import prove_fused
from .weights import Layout, checkpoint_tensors, sources_of

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
        output: a new folder. adapter: None for the base model alone. model: Hub id or folder;
            default: what the adapter's record says. format: "hf" (transformers' names, for vLLM
            and llama.cpp's converter too) or "mlx". dequantize: of a quantized base,
            unpack it, in float32 (the default); False packs the changed layers again, for "mlx"
            only. dtype: of the weights
            ("float32", "bfloat16", "float16"); default: as they are, float32 if unpacked.
        verify: compare logits (default: where the model fits into memory).

    Raises:
        SimPOError: bad input, an architecture that cannot be written, a failed verification.
            Nothing is written then.
    """
    display = display or Display()
    check_arguments(output, dtype)
    if format not in FORMATS:
        raise SimPOError(f"format is {format!r}; it must be one of {', '.join(FORMATS)}")
    if adapter is None and model is None:
        raise SimPOError("--model is missing; name the model to write, or an adapter that knows it")
    config = {} if adapter is None else read_adapter_config(adapter)
    record = get_dict(config, RECORD_KEY)
    base = Base(*base_name(model, revision, config.get("model"), record), trust_remote_code)
    loaded = base.load()
    for difference in differences_from_training(record, loaded):
        display.warn(f"{difference}: the adapter may not fit")
    packed = loaded.config.get("quantization")
    check_packing(packed, format, dequantize, dtype, display)
    layout = layout_of(loaded, architecture(loaded)) if format == "hf" else None
    template = None if adapter is None else trained_template(local_path(adapter))
    keep = bool(packed) and dequantize is False
    precision = dtype or ("float32" if packed and not keep else None)
    verify = wanted(verify, loaded.model, display.note)  # while its weights are there to be counted
    with staged(output) as folder:
        fused = fused_model(loaded, adapter, dequantize=not keep)
        if layout is not None:
            write_hf(folder, base, fused, layout, precision, display)
        else:
            write_mlx_model(folder, base, fused, precision, keep=keep)
        copy_companions(loaded.folder, folder, template, trusted=trust_remote_code)
        if adapter is not None:
            write_record(folder, local_path(adapter), record, base_record(loaded))
        found = prove_fused(folder, base, adapter, display) if verify else []
    return Conversion(local_path(output), found)


def check_packing(
    packed: Any, format: str, dequantize: bool | None, dtype: str | None, display: Display
) -> None:
    """Refuse what cannot be had of a quantized base, and say what is done with it and why."""
    if not packed:
        if dequantize is not None:
            raise SimPOError(
                "--quantize and --dequantize are for a quantized base, but this base is not "
                "quantized; leave them out (`convert from-hf --quantize` packs the result)"
            )
        return
    if dequantize is not False:
        display.note(
            f"the base is quantized to {packed.get('bits')} bits and written unpacked, in "
            f"{dtype or 'float32'}: packing it again would round most of a small tune away"
        )
    elif format == "hf":
        raise SimPOError("transformers does not read MLX's packed weights; use --format mlx")
    elif dtype is not None:
        raise SimPOError(f"dtype is {dtype}, but the weights stay packed; leave it out")


def trained_template(adapter: Path) -> str | None:
    """The chat template that lies beside an adapter; None if there is none."""
    path = adapter / "chat_template.jinja"
    try:
        return path.read_text(encoding="utf-8") if path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise SimPOError(f"cannot read {path}: {error}") from None


def write_hf(
    folder: Path, base: Base, fused: Fused, layout: Layout, dtype: str | None, display: Display
) -> None:
    """Weights and config.json under transformers' names. What the adapter did not touch is copied
    from the base bit for bit, where the base has these names."""
    loaded = base.load()
    config = config_of(loaded)
    precision = dtype or loaded.dtype
    weights = flat_arrays(fused.model.parameters())
    renamed = not is_plain(loaded)
    there = {} if renamed else load_safetensors(weight_files(loaded.folder))
    tensors = {name: tensor for name, tensor in there.items() if goes_along(name, layout)}
    if beside := sorted(tensors.keys() - layout.shapes.keys()):
        display.note(f"copied as they are, not run by MLX: {len(beside)}, e.g. {beside[0]}")
    only = None if renamed else sources_of(layout, fused.changed)
    new = checkpoint_tensors(weights, layout, only)
    tensors |= {n: t.astype(there[n].dtype) if n in there else t for n, t in new.items()}
    if dtype is not None or renamed:
        tensors = {name: as_float(tensor, precision) for name, tensor in tensors.items()}
    # Nothing else may hold on to what is written: memory is to go back after each shard.
    for holder in (there, new, weights):
        holder.clear()
    release(fused.model)
    write_weights(folder, tensors, "pt")
    write_config(folder, config, precision, trusted=base.trust_remote_code)


def goes_along(name: str, layout: Layout) -> bool:
    """Whether a tensor of the base's checkpoint belongs into the new one: not a tied head, nor
    rotary frequencies that old versions of transformers stored."""
    heads = ("lm_head.weight", "language_model.lm_head.weight")
    stale = name.endswith("rotary_emb.inv_freq") or name in heads
    return name in layout.shapes or not stale


def as_float(tensor: mx.array, dtype: str) -> mx.array:
    """The tensor in ``dtype`` if it holds floats."""
    return tensor.astype(DTYPES[dtype]) if mx.issubdtype(tensor.dtype, mx.floating) else tensor


def write_mlx_model(
    folder: Path, base: Base, fused: Fused, dtype: str | None, *, keep: bool
) -> None:
    """Weights and config.json under MLX's names. keep: the weights stay packed."""
    loaded = base.load()
    precision = dtype or loaded.dtype
    weights = flat_arrays(fused.model.parameters())
    tensors = {name: as_float(array, precision) for name, array in weights.items()}
    weights.clear()
    release(fused.model)
    write_weights(folder, tensors, "mlx")
    config = dict(loaded.config)
    if not keep:
        for name in ("quantization", "quantization_config"):
            config.pop(name, None)
    if not base.trust_remote_code:
        config.pop("auto_map", None)  # of code that does not go along
    save_config(config, folder / "config.json")
