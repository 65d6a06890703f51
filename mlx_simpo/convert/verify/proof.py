"""What each conversion is checked against, beside what it wrote."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ...files import read_json
from ...model.adapters import flat_arrays, load_adapter
from ...model.loading import LoadedModel, load_model
from ...model.rope import conflicting_rope_setting
from ...reporting.display import Display
from ..architectures import Architecture, deviation
from ..base import Base, config_of, in_mlx_names, is_plain
from ..lora_delta import apply_lora_deltas
from ..merge import fused_model
from ..mlx_format import read_mlx
from ..peft.read import read_peft
from .compare import Comparison, Logits, check, compare, mlx_logits, sample_tokens, wrong
from .torch_side import torch_logits, torch_reason


@dataclass(frozen=True)
class AdapterProof:
    """Compares an mlx-lm adapter with a PEFT adapter on one base model.

    mlx-lm's layers on the one side; on the other the weights that PEFT's files describe, put
    together by PEFT's definition, and PEFT itself.
    """

    base: Base
    rule: Architecture
    mlx: Path
    peft: Path
    display: Display

    def judged(self) -> list[Comparison]:
        """All comparisons that can be had here, after a note on those that cannot.

        Raises:
            SimPOError: one of them failed.
        """
        plain = self.base.load()
        tokens = sample_tokens(plain)
        ours, theirs = self.in_mlx(tokens)
        found = [compare("mlx-lm's adapter and PEFT's files, both in MLX", theirs, ours)]
        reason = (
            torch_reason() if is_plain(plain) else "the base model is in MLX's format or packed"
        )
        if reason is None:
            floor = torch_floor(plain, tokens, self.display)
            theirs = torch_logits(plain.folder, tokens, self.peft)
            found.append(compare("mlx-lm in MLX and PEFT in torch", theirs, ours, floor))
        else:
            self.display.note(f"not compared with PEFT in torch: {reason}")
        return judged(found, self.display)

    def rounded(self) -> Comparison:
        """What the two differ by once one of them is rounded: shown, not judged."""
        ours, theirs = self.in_mlx(sample_tokens(self.base.load()))
        found = compare("the adapter before and after it was rounded", theirs, ours, None)
        return judged([found], self.display)[0]

    def in_mlx(self, tokens: list[list[int]]) -> tuple[Logits, Logits]:
        """(logits with mlx-lm's layers, logits with the weights that PEFT's files describe)."""
        adapted = self.base.load()
        read_mlx(self.mlx, adapted.model)
        ours = mlx_logits(adapted.model, tokens)
        del adapted
        merged = fused_model(self.base.load(), None, dequantize=True).model
        apply_lora_deltas(merged, read_peft(self.peft, merged, self.rule))
        return ours, mlx_logits(merged, tokens)


def prove_fused(
    folder: Path, base: Base, adapter: str | Path | None, display: Display
) -> list[Comparison]:
    """Compare a folder that was written with the live model it was made of.

    Where the folder has another dtype, rounding is told from mistakes: the adapter is merged in
    memory and compared with the live model before it is rounded and with the folder after; the
    rounding itself is shown.

    Raises:
        SimPOError: one of the comparisons failed.
    """
    live = base.load()
    tokens = sample_tokens(live)
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
        whole = fused_model(base.load(), adapter, dequantize=True).model
        what = "the live model and the same merged in memory"
        found.append(compare(what, mlx_logits(whole, tokens), before))
        meant = rounded(base, adapter, kinds)
        what = "the folder that was written and the same rounded in memory"
        found.append(compare(what, after, mlx_logits(meant, tokens)))
    check_rope(folder)
    if in_mlx_names(written):
        return judged(found, display)
    if reason := torch_reason():
        display.note(f"not compared with transformers: {reason}")
    else:
        source = base.load()
        floor = (
            torch_floor(source, tokens, display) if is_plain(source) else allowed(written, display)
        )
        theirs = torch_logits(folder, tokens)
        found.append(compare("the folder in MLX and in transformers", theirs, after, floor))
    return judged(found, display)


def prove_converted(
    folder: Path, base: Base, memory: nn.Module, display: Display
) -> list[Comparison]:
    """Compare a folder in MLX's format with the model in memory that it was written from, and show
    what both differ by from the model as it came.

    Raises:
        SimPOError: the folder does not hold what was in memory, or MLX and transformers disagree
            about the model itself.
    """
    source = base.load()
    tokens = sample_tokens(source)
    written = load_model(str(folder), trust_remote_code=base.trust_remote_code)
    after = mlx_logits(written.model, tokens)
    what = "the folder that was written and the model in memory"
    found = [compare(what, after, mlx_logits(memory, tokens))]
    before = mlx_logits(source.model, tokens)
    found.append(compare("it and the model as it came, both in MLX", after, before, None))
    reason = torch_reason() if is_plain(source) else "it is in MLX's format or packed"
    if reason is None:
        theirs = torch_logits(source.folder, tokens)
        what = "the model as it came, in MLX and in transformers"
        found.append(compare(what, before, theirs, allowed(source, display)))
    else:
        display.note(f"not compared with transformers: {reason}")
    return judged(found, display)


def rounded(base: Base, adapter: str | Path | None, kinds: dict[str, mx.Dtype]) -> nn.Module:
    """The model with its adapter, merged in memory and rounded to these dtypes, by name."""
    packed = mx.uint32 in kinds.values()
    model = fused_model(base.load(), adapter, dequantize=not packed).model
    arrays = flat_arrays(model.parameters())
    if odd := sorted(arrays.keys() ^ kinds.keys()):
        raise wrong(f"the folder and the model do not have the same weights, e.g. {odd[0]}")
    model.load_weights([(name, array.astype(kinds[name])) for name, array in arrays.items()])
    return model


def allowed(loaded: LoadedModel, display: Display) -> float | None:
    """What MLX and torch may differ by on a model for reasons of their own: None (not judged) where
    mlx-lm is known to compute something else, which is then said."""
    reason = deviation(config_of(loaded))
    if reason:
        display.note(f"not judged against transformers: {reason}")
    return None if reason else 0.0


def check_rope(folder: Path) -> None:
    """SimPOError if a folder's config.json says two things about rotary settings: MLX reads one
    spelling of them, transformers the other."""
    if odd := conflicting_rope_setting(read_json(folder / "config.json")):
        raise wrong(f"config.json has two values of {odd}")


def torch_floor(loaded: LoadedModel, tokens: list[list[int]], display: Display) -> float:
    """What MLX and torch differ by on the model itself, without any conversion; said where that is
    more than rounding, since it hides as much of a conversion's mistakes."""
    found = mlx_logits(loaded.model, tokens)
    bare = compare(
        "MLX and transformers on the base model itself", torch_logits(loaded.folder, tokens), found
    )
    if not bare.passed:
        display.warn(f"{bare}; {deviation(config_of(loaded)) or 'the reason is not known'}")
    return bare.largest


def judged(comparisons: list[Comparison], display: Display) -> list[Comparison]:
    """The comparisons, after showing them; SimPOError if one failed."""
    for comparison in comparisons:
        display.note(str(comparison))
    check(comparisons)
    return comparisons
