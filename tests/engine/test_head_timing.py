"""Chunks of the head: the smallest that is about as quick as the quickest, within the budget."""

from typing import Any

import mlx.core as mx
import pytest
from helpers.clock import FakeClock
from helpers.steps import model_with_lora
from helpers.tiny import tiny_model

from mlx_simpo.engine import head_timing
from mlx_simpo.engine.head import resolve_head
from mlx_simpo.engine.head_timing import PROBE_ROWS, HeadCosts, best_chunk, time_head
from mlx_simpo.engine.stopwatch import Stopwatch
from mlx_simpo.kernels.choice import BUILT_IN
from mlx_simpo.model.adapters import flat_arrays


@pytest.mark.parametrize(
    ("row_s", "best"),
    [
        ({2**20: 1.0, 2**22: 1.0, 2**24: 1.0}, HeadCosts(1.0, 2**20)),
        ({2**20: 1.06, 2**22: 1.04, 2**24: 1.0}, HeadCosts(1.04, 2**22)),
        ({2**20: 2.0, 2**22: 1.5, 2**24: 1.0}, HeadCosts(1.0, 2**24)),
        ({2**24: 1.0}, HeadCosts(1.0, 2**24)),
    ],
)
def test_the_smallest_chunk_within_a_twentieth_of_the_best(
    row_s: dict[int, float], best: HeadCosts
) -> None:
    assert best_chunk(row_s) == best


def measure(model: Any, budget_s: float, row_s: dict[int, float]) -> tuple[Any, list[int], float]:
    """(result, hidden states of each run, seconds), where a hidden state takes so long in a chunk
    of so many."""
    clock, runs = FakeClock(), []

    class Watch(Stopwatch):
        def once(self, work):
            rows = work()[1][1].shape[0]  # the gradient of the hidden states
            runs.append(rows)
            clock.now += rows * row_s[rows]
            return super().once(work)._replace(seconds=rows * row_s[rows])

    head = resolve_head(model)
    result = time_head(Watch(budget_s, clock), model, head, BUILT_IN, max(row_s.values()))
    return result, runs, clock.now


# The tiny model has 512 token ids: 2²⁰ logits are more rows than a launch takes, so there is one
# chunk; with other sizes, three.
CHUNKS = (2**15, 2**16, 2**17)
ROWS = {PROBE_ROWS: 2.0, 64: 1.2, 128: 1.0, 256: 1.0}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_timing, "CHUNKS", CHUNKS)


@pytest.mark.usefixtures("small_chunks")
def test_each_chunk_runs_once_before_it_counts() -> None:
    result, runs, _ = measure(tiny_model(), 1e5, ROWS)
    assert result == HeadCosts(1.0, 2**16)
    assert runs == [rows for rows in ROWS for _ in range(3)]  # quick: timed twice


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("budget_s", "result"),
    [
        (0.0, None),
        (31.0, None),  # twice 16 s
        (100.0, HeadCosts(2.0, None)),
        (500.0, HeadCosts(1.2, 2**15)),
        (1200.0, HeadCosts(1.0, 2**16)),
    ],
)
def test_the_budget_is_never_exceeded(budget_s: float, result: HeadCosts | None) -> None:
    actual, _, seconds = measure(tiny_model(), budget_s, ROWS)
    assert actual == result
    assert seconds <= budget_s


@pytest.mark.parametrize("trains", [False, True])
def test_a_head_that_trains_is_timed_with_the_gradient_of_its_weights(trains: bool) -> None:
    """And the random numbers are as they were."""
    model = model_with_lora()
    if trains:
        model.model.norm.unfreeze()
        model.model.embed_tokens.unfreeze()  # tied: it is the head
    before = mx.random.state[0].tolist()  # type: ignore[index]
    gradients = []

    class Watch(Stopwatch):
        def once(self, work):
            gradients.append(work()[1])
            return super().once(work)

    time_head(Watch(1e5, FakeClock()), model, resolve_head(model), BUILT_IN, 0.0)
    assert gradients
    for d_weights, d_hidden in gradients:
        assert float(mx.abs(d_hidden).max()) > 0
        trained = {n for n, d in flat_arrays(d_weights).items() if float(mx.abs(d).max()) > 0}
        assert trained == ({"model.embed_tokens.weight"} if trains else set())
    assert mx.random.state[0].tolist() == before  # type: ignore[index]
