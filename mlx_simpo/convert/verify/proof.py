"""What each kind of conversion is compared with after it was written."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from ...files import read_json
from ...model.adapters import flat_arrays, load_adapter
from ...model.loading import LoadedModel, load_model
from ...model.rope import conflicting_rope_setting
from ...reporting.display import Display
from ..architectures import Architecture, known_deviation
from ..base import Base, config_of, has_mlx_names, is_transformers_checkpoint
from ..lora_delta import apply_lora_deltas
from ..merge import fused_model
from ..mlx_format import read_mlx
from ..peft.read import read_peft
from .compare import (
    Comparison,
    Logits,
    check,
    compare,
    mlx_logits,
    sample_tokens,
    verification_error,
)
from .torch_side import missing_packages, torch_logits

NOT_TRANSFORMERS = "the base model is in MLX's format or quantized"


@dataclass(frozen=True)
class AdapterProof:
    """Compares an mlx-lm adapter with a PEFT adapter on the same base model.

    The mlx-lm adapter runs in mlx-lm's layers. The PEFT adapter is merged into the weights by the
    definition of LoRA, and runs in PEFT itself where that is installed.

    mlx, peft: the folders of the two adapters.
    """

    base: Base
    rule: Architecture
    mlx: Path
    peft: Path
    display: Display

    def verify(self) -> list[Comparison]:
        """Make all comparisons that are possible here, and note why others are not.

        Raises:
            SimPOError: one of them failed.
        """
        loaded = self.base.load()
        tokens = sample_tokens(loaded)
        mlx, peft = self.logits_in_mlx(tokens)
        comparisons = [compare("mlx-lm's adapter and PEFT's files, both in MLX", peft, mlx)]
        reason = missing_packages() if is_transformers_checkpoint(loaded) else NOT_TRANSFORMERS
        if reason is None:
            baseline = measured_baseline(loaded, tokens, self.display)
            peft = torch_logits(loaded.folder, tokens, self.peft)
            comparisons.append(compare("mlx-lm in MLX and PEFT in torch", peft, mlx, baseline))
        else:
            self.display.note(f"not compared with PEFT in torch: {reason}")
        return show_and_check(comparisons, self.display)

    def compare_rounded(self) -> Comparison:
        """Compare the two adapters after one was cast to another dtype; this cannot fail."""
        mlx, peft = self.logits_in_mlx(sample_tokens(self.base.load()))
        comparison = compare("the adapter before and after it was rounded", peft, mlx, None)
        return show_and_check([comparison], self.display)[0]

    def logits_in_mlx(self, tokens: list[list[int]]) -> tuple[Logits, Logits]:
        """Return the logits of both adapters in MLX.

        Returns:
            Those of mlx-lm's layers, and those of the base model with PEFT's files merged in.
        """
        adapted = self.base.load()
        read_mlx(self.mlx, adapted.model)
        logits = mlx_logits(adapted.model, tokens)
        del adapted  # free its weights before the next model is loaded
        merged = fused_model(self.base.load(), None, dequantize=True).model
        apply_lora_deltas(merged, read_peft(self.peft, merged, self.rule))
        return logits, mlx_logits(merged, tokens)


def verify_fused(
    folder: Path, base: Base, adapter: str | Path | None, display: Display
) -> list[Comparison]:
    """Compare a folder that was written with the base model and adapter that it was made of.

    If the folder is not in float32, rounding is separated from mistakes: the adapter is merged in
    memory, and the result is compared with base model and adapter before it is rounded, and with
    the folder after. The effect of rounding is only shown.

    Raises:
        SimPOError: one of the comparisons failed.
    """
    loaded = base.load()
    tokens = sample_tokens(loaded)
    base_logits = mlx_logits(loaded.model, tokens)
    # Attached with mlx-lm's layers, not merged: merging is among the things that are verified.
    if adapter is not None:
        loaded = base.load()
        load_adapter(loaded.model, adapter)
    expected = mlx_logits(loaded.model, tokens)
    written = load_model(str(folder), trust_remote_code=base.trust_remote_code)
    dtypes = {name: array.dtype for name, array in flat_arrays(written.model.parameters()).items()}
    actual = mlx_logits(written.model, tokens)
    original = "the base model" if adapter is None else "the base model with the adapter"
    what = f"{original} and the folder that was written, both in MLX"
    if set(dtypes.values()) == {mx.float32}:
        comparisons = [compare(what, actual, expected)]
    else:
        comparisons = [compare(f"{what}, as rounded", actual, expected, None)]
        if adapter is not None:
            what = "for comparison, what the adapter changes"
            comparisons.append(compare(what, expected, base_logits, None))
        merged = fused_model(base.load(), adapter, dequantize=True).model
        what = f"{original} and the same merged in memory"
        comparisons.append(compare(what, mlx_logits(merged, tokens), expected))
        rounded = merged_and_rounded(base, adapter, dtypes)
        what = "the folder that was written and the same rounded in memory"
        comparisons.append(compare(what, actual, mlx_logits(rounded, tokens)))
    check_rope_settings(folder)
    if has_mlx_names(written):
        return show_and_check(comparisons, display)
    if reason := missing_packages():
        display.note(f"not compared with transformers: {reason}")
    else:
        source = base.load()
        baseline = (
            measured_baseline(source, tokens, display)
            if is_transformers_checkpoint(source)
            else assumed_baseline(written, display)
        )
        in_torch = torch_logits(folder, tokens)
        what = "the folder in MLX and in transformers"
        comparisons.append(compare(what, in_torch, actual, baseline))
    return show_and_check(comparisons, display)


def verify_converted(
    folder: Path, base: Base, in_memory: nn.Module, display: Display
) -> list[Comparison]:
    """Compare a folder in MLX's format with the model in memory that it was written from.

    The difference to the original model, before any quantization, is only shown.

    Raises:
        SimPOError: the folder does not hold what was in memory, or MLX and transformers disagree
            about the original model.
    """
    source = base.load()
    tokens = sample_tokens(source)
    written = load_model(str(folder), trust_remote_code=base.trust_remote_code)
    actual = mlx_logits(written.model, tokens)
    what = "the folder that was written and the model in memory"
    comparisons = [compare(what, actual, mlx_logits(in_memory, tokens))]
    original = mlx_logits(source.model, tokens)
    what = "the folder and the original model, both in MLX"
    comparisons.append(compare(what, actual, original, None))
    reason = missing_packages() if is_transformers_checkpoint(source) else NOT_TRANSFORMERS
    if reason is None:
        in_torch = torch_logits(source.folder, tokens)
        what = "the original model in MLX and in transformers"
        baseline = assumed_baseline(source, display)
        comparisons.append(compare(what, original, in_torch, baseline))
    else:
        display.note(f"not compared with transformers: {reason}")
    return show_and_check(comparisons, display)


def merged_and_rounded(
    base: Base, adapter: str | Path | None, dtypes: dict[str, mx.Dtype]
) -> nn.Module:
    """Merge an adapter into its base model in memory and round the result to these dtypes.

    Args:
        dtypes: of the written weights, by name.

    Raises:
        SimPOError: weights of other names were written.
    """
    quantized = mx.uint32 in dtypes.values()  # packed weights are the only integers
    model = fused_model(base.load(), adapter, dequantize=not quantized).model
    arrays = flat_arrays(model.parameters())
    if differing := sorted(arrays.keys() ^ dtypes.keys()):
        raise verification_error(
            f"the folder and the model do not have the same weights, e.g. {differing[0]}"
        )
    model.load_weights([(name, array.astype(dtypes[name])) for name, array in arrays.items()])
    return model


def assumed_baseline(loaded: LoadedModel, display: Display) -> float | None:
    """Return the baseline for comparing a model in MLX and in torch, without measuring it.

    Returns:
        0.0; None, after a note, if mlx-lm is known to compute something else than transformers.
    """
    reason = known_deviation(config_of(loaded))
    if reason:
        display.note(f"the difference to transformers is only shown, not checked: {reason}")
    return None if reason else 0.0


def measured_baseline(loaded: LoadedModel, tokens: list[list[int]], display: Display) -> float:
    """Return the difference between MLX and torch on the base model, without any conversion.

    Warns if it is more than rounding, since the conversion could hide mistakes of that size.
    """
    what = "MLX and transformers on the base model itself"
    in_torch = torch_logits(loaded.folder, tokens)
    comparison = compare(what, in_torch, mlx_logits(loaded.model, tokens))
    if not comparison.passed:
        reason = known_deviation(config_of(loaded)) or "the reason is not known"
        display.warn(f"{comparison}; {reason}")
    return comparison.largest


def check_rope_settings(folder: Path) -> None:
    """Check that both spellings of the rotary settings in config.json agree.

    MLX reads one of them and transformers the other.

    Raises:
        SimPOError: they contradict each other.
    """
    if setting := conflicting_rope_setting(read_json(folder / "config.json")):
        raise verification_error(f"config.json has two values of {setting}")


def show_and_check(comparisons: list[Comparison], display: Display) -> list[Comparison]:
    """Show comparisons, check them and return them.

    Raises:
        SimPOError: one failed.
    """
    for comparison in comparisons:
        display.note(str(comparison))
    check(comparisons)
    return comparisons
