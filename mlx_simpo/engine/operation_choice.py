"""Which attention and which delta rule a model's layers compute with here, and why."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import mlx.core as mx

from ..device import is_gpu
from ..errors import SimPOError
from .attention import attention
from .attention_shapes import AttentionShape, attention_shape, mask_kind, observe_attention
from .figures import Figures
from .fused_attention import (
    check_forward_attention,
    check_fused_attention,
    has_fused_gradient,
    mlx_attention,
)
from .fused_delta_rule import choose_delta_rule
from .lora_linear import lora_operation
from .operations import Attention, AttentionCall, Operations

AttentionSetting = Literal["auto", "mlx", "blocks"]
_Item = TypeVar("_Item")


class OperationChoice(NamedTuple):
    """What the layers compute with while training and in evaluation.

    note: what runs and why, for the user.
    """

    training: Operations
    evaluation: Operations
    note: str


class AttentionChoice(NamedTuple):
    """Attention while training and in evaluation; note: which and why, for the user."""

    training: Attention
    evaluation: Attention
    note: str


def choose_operations(model: Any, setting: AttentionSetting, figures: Figures) -> OperationChoice:
    """Return what computes attention and the delta rule in this model on MLX's default device.

    What MLX has of its own is compared with ours before it is used; see `fused_attention`.

    Args:
        setting: of ``engine.attention``.

    Raises:
        SimPOError: setting is "mlx", and MLX's attention is not right here.
        TypeError: the model's caches cannot be forked; see `prefix_cache.reason_not_shareable`.
    """
    chosen = choose_attention(observe_attention(model), setting, figures)
    delta_rule, delta_note = choose_delta_rule(model)
    lora = lora_operation()
    return OperationChoice(
        Operations(chosen.training, delta_rule, lora),
        Operations(chosen.evaluation, delta_rule, lora),
        "; ".join(note for note in (f"attention: {chosen.note}", delta_note) if note),
    )


def choose_attention(
    shapes: Sequence[AttentionShape], setting: AttentionSetting, figures: Figures
) -> AttentionChoice:
    """Return what computes attention of these shapes on MLX's default device.

    Raises:
        SimPOError: setting is "mlx", and MLX's attention is not right here.
    """
    blocks = attention_in_blocks(figures.tile_scores)
    sizes = _unique(shape.without_mask for shape in shapes if shape.is_plain)
    if not sizes:
        # Sinks and additive masks are neither fused nor ours: MLX differentiates its own formula.
        own = "MLX's operations, for sinks or masks that add to the scores"
        return AttentionChoice(blocks, blocks, own if shapes else "the model's own, if it has any")
    if setting == "blocks":
        return AttentionChoice(blocks, blocks, "blocks, as engine.attention=blocks asks")
    if setting == "mlx":
        return AttentionChoice(mlx_attention, mlx_attention, _note_of_forced(sizes))
    if not is_gpu():
        note = "blocks (mlx-simpo's own; MLX's gradient on the CPU would store all scores)"
        return AttentionChoice(blocks, blocks, note)
    training, note = _training_on_gpu(shapes, sizes, blocks, figures)
    failures = _unique(filter(None, map(_forward_failure, sizes)))
    if failures:
        return AttentionChoice(training, blocks, f"{note}, blocks in evaluation ({failures[0]})")
    return AttentionChoice(training, mlx_attention, f"{note}, MLX's operation in evaluation")


def attention_in_blocks(tile_scores: int) -> Attention:
    """Return our attention, which leaves to MLX what it does not compute: sinks, and masks that add
    to scores (they may have a gradient) or differ by head."""

    def compute(call: AttentionCall) -> mx.array:
        if call.sinks is not None or mask_kind(call.mask) == "other":
            return mlx_attention(call)
        return attention(*call[:5], tile_scores)

    return compute


def fused_attention(otherwise: Attention) -> Attention:
    """Return MLX's attention wherever its gradient is fused and right, ``otherwise`` elsewhere.

    It is decided call by call: arrays (sliding windows), head sizes and numbers of queries that the
    fused kernels do not take would be differentiated step by step, with all scores in memory.
    """

    def compute(call: AttentionCall) -> mx.array:
        shape, mask = attention_shape(call), call.mask
        lengths = (call.queries.shape[2], call.keys.shape[2])
        is_fused = not isinstance(mask, mx.array) and has_fused_gradient(shape, lengths, mask)
        if is_fused and check_fused_attention(shape).passed:
            return mlx_attention(call)
        return otherwise(call)

    return compute


def _training_on_gpu(
    shapes: Sequence[AttentionShape],
    sizes: Sequence[AttentionShape],
    blocks: Attention,
    figures: Figures,
) -> tuple[Attention, str]:
    """Return what computes attention while training on a GPU, and why."""
    reasons = [_reason_for_blocks(size, figures) for size in sizes]
    why = ", ".join(_unique(reason for reason in reasons if reason))
    if all(reasons):
        return blocks, f"blocks ({why})"
    for_some = ["sliding windows"] if any(shape.mask == "window" for shape in shapes) else []
    for_some += [f"some layers ({why})"] if why else []
    others = f", blocks for {' and '.join(for_some)}" if for_some else ""
    return (
        fused_attention(blocks),
        f"MLX's fused operation, whose gradient agrees with that of the blocks{others}",
    )


def _reason_for_blocks(shape: AttentionShape, figures: Figures) -> str | None:
    """Return why MLX's fused gradient is not used for this shape; None where it is."""
    if not has_fused_gradient(shape):
        return f"MLX has no fused gradient for {shape.description}"
    if figures.attention != "mlx":
        better = "is no better here" if figures.evidence else "is not known to be better here"
        return f"MLX's fused gradient {better}"
    agreement = check_fused_attention(shape)
    return None if agreement.passed else f"{agreement.name} {agreement.failure}"


def _forward_failure(shape: AttentionShape) -> str | None:
    agreement = check_forward_attention(shape)
    return None if agreement.passed else f"{agreement.name} {agreement.failure}"


def _note_of_forced(sizes: Sequence[AttentionShape]) -> str:
    """Return the note on MLX's attention wherever the user asks for it.

    Raises:
        SimPOError: it is not right here.
    """
    for size in sizes:
        for agreement in (check_fused_attention(size), check_forward_attention(size)):
            if not agreement.passed:
                raise SimPOError(
                    f"engine.attention is mlx, but {agreement.name} {agreement.failure}. Leave it "
                    "out, or set engine.attention=blocks; please report this together with the "
                    "output of `mlx-simpo doctor`"
                )
    unfused = _unique(size.description for size in sizes if not has_fused_gradient(size))
    note = "MLX's operation, as engine.attention=mlx asks"
    return f"{note} (its gradient is not fused for {', '.join(unfused)})" if unfused else note


def _unique(items: Iterable[_Item]) -> list[_Item]:
    return list(dict.fromkeys(items))
