"""What each conversion is checked against, beside what it wrote."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ..model.adapters import flat_arrays, load_adapter
from ..model.loading import Loaded, load_model
from ..report import Report
from .architectures import Architecture, deviation
from .base import Base, config_of, in_mlx_names
from .merge import fused_model
from .mlx_format import read_mlx
from .peft_read import read_peft
from .torch_side import torch_logits, torch_reason
from .updates import apply_updates
from .verify import (
    Comparison,
    check,
    compare,
    mlx_logits,
    sample_tokens,
)


def prove_adapters(
    base: Base, rule: Architecture, mlx: Path, peft: Path, report: Report, exact: bool
) -> list[Comparison]:
    """Compare an mlx-lm adapter with a PEFT adapter on one base model, in all ways that can be had
    here; those that cannot are said.

    mlx-lm's layers on the one side; on the other the weights that PEFT's files describe, put
    together by PEFT's definition, and PEFT itself.

    Args:
        exact: the tensors kept their dtype; otherwise differences are shown and not judged.

    Raises:
        SimPOError: one of the comparisons failed.
    """
    plain = base.load()
    tokens = sample_tokens(plain.tokenizer)
    adapted = base.load()
    read_mlx(mlx, adapted.model)
    ours = mlx_logits(adapted.model, tokens)
    del adapted
    merged = fused_model(base.load(), None, dequantize=True).model
    apply_updates(merged, read_peft(peft, merged, rule))
    theirs = mlx_logits(merged, tokens)
    del merged
    floor = 0.0 if exact else None
    found = [compare("mlx-lm's adapter and PEFT's files, both in MLX", theirs, ours, floor)]
    reason = "the base model is in MLX's format" if mlx_only(plain) else torch_reason()
    if reason is None:
        measured = torch_floor(plain, tokens)
        theirs = torch_logits(plain.folder, tokens, peft)
        floor = measured if exact else None
        found.append(compare("mlx-lm in MLX and PEFT in torch", theirs, ours, floor))
    else:
        report.note(f"not compared with PEFT in torch: {reason}")
    return judged(found, report)


def prove_fused(
    folder: Path, base: Base, adapter: str | Path | None, report: Report
) -> list[Comparison]:
    """Compare a folder that was written with the live model it was made of.

    Where the folder has another dtype, rounding is told from mistakes: what it should hold is
    rounded in memory and compared with, and the rounding itself is shown.

    Raises:
        SimPOError: one of the comparisons failed.
    """
    live = base.load()
    tokens = sample_tokens(live.tokenizer)
    bare = mlx_logits(live.model, tokens)
    if adapter is not None:
        live = base.load()
        load_adapter(live.model, adapter)
    before = mlx_logits(live.model, tokens)
    written = load_model(str(folder), trust_remote_code=base.trust_remote_code)
    kinds = {name: array.dtype for name, array in flat_arrays(written.model.parameters()).items()}
    after = mlx_logits(written.model, tokens)
    what = "the live model and the folder that was written, both in MLX"
    if set(kinds.values()) == {mx.float32}:
        found = [compare(what, after, before)]
    else:
        found = [compare(f"{what}, as rounded", after, before, None)]
        if adapter is not None:
            found.append(compare("for comparison, what the adapter changes", before, bare, None))
        meant = rounded(base, adapter, kinds)
        what = "the folder that was written and the same rounded in memory"
        found.append(compare(what, after, mlx_logits(meant, tokens)))
    if in_mlx_names(written):
        return judged(found, report)
    if reason := torch_reason():
        report.note(f"not compared with transformers: {reason}")
    else:
        floor = allowed(written, report)
        if not mlx_only(base.load()):
            floor = torch_floor(base.load(), tokens)
        theirs = torch_logits(folder, tokens)
        found.append(compare("the folder in MLX and in transformers", theirs, after, floor))
    return judged(found, report)


def prove_converted(
    folder: Path, base: Base, memory: nn.Module, report: Report
) -> list[Comparison]:
    """Compare a folder in MLX's format with the model in memory that it was written from, and show
    what both differ by from the model as it came.

    Raises:
        SimPOError: the folder does not hold what was in memory, or MLX and transformers disagree
            about the model itself.
    """
    source = base.load()
    tokens = sample_tokens(source.tokenizer)
    written = load_model(str(folder), trust_remote_code=base.trust_remote_code)
    after = mlx_logits(written.model, tokens)
    what = "the folder that was written and the model in memory"
    found = [compare(what, after, mlx_logits(memory, tokens))]
    before = mlx_logits(source.model, tokens)
    found.append(compare("it and the model as it came, both in MLX", after, before, None))
    reason = "it is in MLX's format already" if mlx_only(source) else torch_reason()
    if reason is None:
        theirs = torch_logits(source.folder, tokens)
        what = "the model as it came, in MLX and in transformers"
        found.append(compare(what, before, theirs, allowed(source, report)))
    else:
        report.note(f"not compared with transformers: {reason}")
    return judged(found, report)


def rounded(base: Base, adapter: str | Path | None, kinds: dict[str, mx.Dtype]) -> nn.Module:
    """The model with its adapter, merged in memory and rounded to these dtypes, by name."""
    packed = mx.uint32 in kinds.values()
    model = fused_model(base.load(), adapter, dequantize=not packed).model
    arrays = flat_arrays(model.parameters())
    model.load_weights([(name, array.astype(kinds[name])) for name, array in arrays.items()])
    return model


def allowed(loaded: Loaded, report: Report) -> float | None:
    """What MLX and torch may differ by on a model for reasons of their own: None (not judged) where
    mlx-lm is known to compute something else, which is then said."""
    reason = deviation(config_of(loaded))
    if reason:
        report.note(f"not judged against transformers: {reason}")
    return None if reason else 0.0


def mlx_only(loaded: Loaded) -> bool:
    """Whether transformers cannot read a model's folder."""
    return in_mlx_names(loaded) or "quantization_config" in loaded.config


def torch_floor(loaded: Loaded, tokens: list[list[int]]) -> float:
    """What MLX and torch differ by on the model itself, without any conversion."""
    found = mlx_logits(loaded.model, tokens)
    return compare("base", torch_logits(loaded.folder, tokens), found, None).largest


def judged(comparisons: list[Comparison], report: Report) -> list[Comparison]:
    """The comparisons, after showing them; SimPOError if one failed."""
    for comparison in comparisons:
        report.note(str(comparison))
    check(comparisons)
    return comparisons
