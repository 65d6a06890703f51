"""MLX's fused attention or blocks: the quicker one, and with little difference the smaller one."""

from typing import Any

import mlx.core as mx
import pytest
from helpers.clock import FakeClock
from helpers.devices import on_cpu
from helpers.fused import fused_attention_stand_in, wrong_keys
from helpers.tiny import tiny_model

from mlx_simpo.engine.attention_timing import (
    TILES,
    AttentionTiming,
    attention_evidence,
    best_attention,
    time_attention,
)
from mlx_simpo.engine.figures import CPU
from mlx_simpo.engine.stopwatch import Stopwatch
from mlx_simpo.engine.trial_shapes import Lengths, Shape

SHAPE = Shape(1, Lengths(64, 128))


class Watch(Stopwatch):
    """Work takes 1 s, whatever it is; it is evaluated all the same."""

    def __init__(self, budget_s: float = 1e6) -> None:
        self.clock = FakeClock()
        super().__init__(budget_s, self.clock)

    def once(self, work: Any) -> Any:
        self.clock.now += 1.0
        return super().once(work)._replace(seconds=1.0)


def timed(model: Any, setting: Any = "auto", shape: Shape = SHAPE) -> list[tuple]:
    """The attentions that are timed, MLX's without tiles."""
    timings = time_attention(Watch(), model, shape, setting, TILES[0], 1.0)
    return [(t.name, t.tile_scores) if t.name == "blocks" else (t.name,) for t in timings]


def test_on_a_cpu_there_are_only_blocks_to_choose_from() -> None:
    long = Shape(1, Lengths(256, 256))  # 2 rows of 256 queries and 512 keys in 4 heads: 2²⁰ scores
    with on_cpu():
        assert timed(tiny_model()) == []  # short: all sizes have one tile
        assert timed(tiny_model(), shape=long) == [("blocks", 2**19), ("blocks", 2**22)]
        assert timed(tiny_model(), "mlx", long) == []


def test_of_sizes_that_make_the_same_tiles_the_built_in_one_stays() -> None:
    """Longer pairs may need the difference, and nothing was measured of it."""
    with fused_attention_stand_in():
        timings = time_attention(Watch(), tiny_model(), SHAPE, "auto", 2**23, 1.0)
    assert [t.tile_scores for t in timings] == [2**23, 2**23]


def test_where_mlx_has_a_fused_gradient_both_are_timed_with_their_gradients() -> None:
    with fused_attention_stand_in() as stand_in:
        assert timed(tiny_model()) == [("mlx",), ("blocks", TILES[0])]
        # What is checked first is small; the prefix and the continuations are these.
        assert (64, 64, "causal") in stand_in.backward
        assert (128, 192, "causal") in stand_in.backward
        assert timed(tiny_model(), "blocks") == []
        assert timed(tiny_model(), "mlx") == []


def test_a_fused_gradient_that_is_wrong_is_not_timed() -> None:
    with fused_attention_stand_in(wrong_keys):
        assert timed(tiny_model()) == []


def test_without_attention_of_mlx_lm_there_is_nothing_to_choose() -> None:
    with fused_attention_stand_in():
        assert timed(tiny_model("gemma2", query_pre_attn_scalar=8)) == []


@pytest.mark.parametrize(("budget_s", "count"), [(1.0, 0), (3.0, 1), (10.0, 1), (11.0, 2)])
def test_the_budget_is_never_exceeded(budget_s: float, count: int) -> None:
    """Each runs twice; the second is expected to take up to four times as long as the first."""
    with fused_attention_stand_in():
        watch = Watch(budget_s)
        timings = time_attention(watch, tiny_model(), SHAPE, "auto", TILES[0], 1.0)
        assert len(timings) == count
        assert watch.clock.now <= budget_s


def timing(name: Any, seconds: float, size: int, tile_scores: int = 1) -> AttentionTiming:
    return AttentionTiming(name, tile_scores, seconds, size)


@pytest.mark.parametrize(
    ("timings", "name", "tile_scores"),
    [
        ([], "blocks", CPU.tile_scores),
        ([timing("mlx", 1.0, 9), timing("blocks", 2.0, 1, 7)], "mlx", 7),
        ([timing("mlx", 2.0, 1), timing("blocks", 1.0, 9, 7)], "blocks", 7),
        ([timing("mlx", 1.04, 1), timing("blocks", 1.0, 9, 7)], "mlx", 7),
        ([timing("mlx", 1.06, 1), timing("blocks", 1.0, 9, 7)], "blocks", 7),
        ([timing("mlx", 1.0, 9), timing("blocks", 1.04, 1, 7)], "blocks", 7),
        ([timing("blocks", 1.0, 9, 7), timing("blocks", 1.04, 5, 8)], "blocks", 8),
        (
            [timing("mlx", 1.0, 1), timing("blocks", 3.0, 1, 7), timing("blocks", 2.0, 9, 8)],
            "mlx",
            8,
        ),
        ([timing("mlx", 1.0, 1)], "mlx", CPU.tile_scores),
    ],
)
def test_the_quicker_one_and_within_a_twentieth_the_one_with_less_memory(
    timings: list[AttentionTiming], name: str, tile_scores: int
) -> None:
    figures = best_attention(timings, CPU)
    assert (figures.attention, figures.tile_scores) == (name, tile_scores)


def test_the_evidence_has_time_and_memory_of_both() -> None:
    mlx, blocks = timing("mlx", 0.0031, 2 * 10**7), timing("blocks", 0.004, 11 * 10**7)
    slower = timing("blocks", 0.006, 10**7)
    assert attention_evidence([mlx, blocks, slower]) == (
        "attention of a layer: MLX's fused 3.1 ms and 0.02 GB against blocks 4.0 ms and 0.11 GB"
    )
    assert attention_evidence([slower]) == "attention of a layer: blocks 6.0 ms and 0.01 GB"


def test_inputs_do_not_move_the_random_numbers() -> None:
    before = mx.random.state[0].tolist()  # type: ignore[index]
    with fused_attention_stand_in():
        assert timed(tiny_model())
    assert mx.random.state[0].tolist() == before  # type: ignore[index]
