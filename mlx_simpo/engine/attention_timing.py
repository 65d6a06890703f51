"""Whether MLX's fused attention or our blocks are quicker on this device, at a run's lengths."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx

from .attention import split_into_tiles
from .attention_shapes import AttentionShape, observe_attention
from .figures import AttentionName, Figures
from .fused_attention import check_fused_attention, has_fused_gradient
from .operation_choice import AttentionSetting, attention_in_blocks, fused_attention
from .operations import Attention, AttentionCall
from .stopwatch import ABOUT_AS_QUICK, Stopwatch, Work
from .trial_shapes import Shape

TILES = (2**19, 2**22, 2**24)  # scores that the blocks compute at once
# How much slower than the first alternative another one should be, at most.
MARGIN = 4.0


class AttentionTiming(NamedTuple):
    """What value and gradient of a layer's attention take in a micro-batch of typical pairs.

    tile_scores: of the blocks; MLX's has none.
    """

    name: AttentionName
    tile_scores: int
    seconds: float
    bytes: int


class _Pass(NamedTuple):
    """A forward pass: rows, and in each the last positions that are queries of all keys."""

    rows: int
    queries: int
    keys: int


def time_attention(
    watch: Stopwatch,
    model: Any,
    shape: Shape,
    setting: AttentionSetting,
    tile_scores: int,
    layer_s: float,
) -> list[AttentionTiming]:
    """Time the attentions that the setting allows, as far as the budget goes.

    Args:
        shape: of a micro-batch of the run. setting: of ``engine.attention``. tile_scores: built in.
        layer_s: the most that a layer's attention should take.

    Returns:
        Nothing if there is no choice: one kind, or models that compute their scores themselves.
    """
    shapes = list({s.without_mask: 0 for s in observe_attention(model) if s.is_plain})
    pairs, (prefix, continuation), _ = shape
    calls = [_Pass(pairs, prefix, prefix), _Pass(2 * pairs, continuation, prefix + continuation)]
    alternatives = _alternatives(shapes, calls, setting, tile_scores)
    if not shapes or len(alternatives) < 2:
        return []
    timings: list[AttentionTiming] = []
    for name, tiles in alternatives:
        run = attention_in_blocks(tiles)
        work = _work(fused_attention(run) if name == "mlx" else run, shapes, calls)
        measured = watch.measure(work, layer_s, is_new=True)
        if measured is None:
            break
        timings.append(AttentionTiming(name, tiles, *measured))
        layer_s = MARGIN * timings[0].seconds
    return timings


def _alternatives(
    shapes: Sequence[AttentionShape],
    calls: Sequence[_Pass],
    setting: AttentionSetting,
    built_in: int,
) -> list[tuple[AttentionName, int]]:
    """Return the attentions to choose from, with their tile_scores, MLX's first."""
    alternatives: dict[Any, tuple[AttentionName, int]] = {}
    is_fused = any(
        has_fused_gradient(shape, (call.queries, call.keys)) and check_fused_attention(shape).passed
        for shape in shapes
        for call in calls
    )
    if setting == "auto" and is_fused:
        alternatives["mlx"] = ("mlx", built_in)
    if setting != "mlx":
        for tile_scores in (built_in, *TILES):
            # Sizes that divide these calls into the same tiles are one.
            tiles = tuple(
                tuple(
                    split_into_tiles(
                        (c.rows, s.heads, c.queries, s.head_size), c.keys, tile_scores, causal=True
                    )
                )
                for s in shapes
                for c in calls
            )
            alternatives.setdefault(tiles, ("blocks", tile_scores))
    return list(alternatives.values())


def _work(run: Attention, shapes: Sequence[AttentionShape], calls: Sequence[_Pass]) -> Work:
    """Return value and gradient of these calls, in a layer of each shape."""
    inputs = []
    for shape in shapes:
        for call in calls:
            sizes = (
                (call.rows, shape.heads, call.queries, shape.head_size),
                (call.rows, shape.kv_heads, call.keys, shape.head_size),
                (call.rows, shape.kv_heads, call.keys, shape.value_size),
                (call.rows, shape.heads, call.queries, shape.value_size),
            )
            arrays = [
                mx.random.normal(size, key=mx.random.key(i)).astype(shape.dtype)
                for i, size in enumerate(sizes)
            ]
            inputs.append((shape.scale, arrays))
    mx.eval([arrays for _, arrays in inputs])

    def work() -> Any:
        return [
            mx.vjp(
                lambda q, k, v, scale=scale: run(AttentionCall(q, k, v, scale, "causal")),
                primals,
                [cotangent],
            )
            for scale, (*primals, cotangent) in inputs
        ]

    return work


def best_attention(timings: Sequence[AttentionTiming], figures: Figures) -> Figures:
    """Return the figures with the attention that takes the least memory among those that are about
    as quick as the quickest; unchanged without timings."""
    if not timings:
        return figures
    bound = ABOUT_AS_QUICK * min(timing.seconds for timing in timings)
    best = min((t for t in timings if t.seconds <= bound), key=lambda t: t.bytes)
    blocks = [t for t in timings if t.name == "blocks"]
    # The blocks may still be needed: a layer with a sliding window has no other attention.
    tiles = best if best.name == "blocks" else min(blocks, key=lambda t: t.seconds, default=None)
    tile_scores = figures.tile_scores if tiles is None else tiles.tile_scores
    return replace(figures, attention=best.name, tile_scores=tile_scores)


def attention_evidence(timings: Sequence[AttentionTiming]) -> str:
    """Return what was measured of attention in a sentence for the user: the quickest of a kind."""
    texts = []
    for name, words in (("mlx", "MLX's fused"), ("blocks", "blocks")):
        same = [timing for timing in timings if timing.name == name]
        if same:
            quickest = min(same, key=lambda t: t.seconds)
            texts.append(
                f"{words} {1e3 * quickest.seconds:.1f} ms and {quickest.bytes / 1e9:.2f} GB"
            )
    return f"attention of a layer: {' against '.join(texts)}"
