"""The collapse watch: silent on healthy runs, whatever their noise; warns of a planted divergence
once; a restored watch is the watch that never stopped."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_simpo import SimPOError
from mlx_simpo.training.watch import CollapseWatch, before_fall, step_noise

REAL_RUN = Path(__file__).parents[2] / "benchmarks" / "results" / "smollm2_alpacaeval.json"

# logps/chosen, loss, grad_norm of three runs of configs/demo.yaml, whose pairs are the same: as it
# is, and with learning rates of 1e-2 and 1e6. Each loss looks good, or at least not bad.
HEALTHY = [
    (-2.878, 1.360, 0.785),
    (-3.076, 1.764, 1.039),
    (-3.580, 1.896, 1.138),
    (-3.504, 2.332, 1.211),
    (-2.970, 1.145, 0.964),
    (-2.938, 1.335, 1.179),
    (-2.831, 0.943, 1.007),
    (-2.721, 0.828, 0.800),
    (-2.339, 0.522, 0.725),
    (-2.176, 0.422, 0.539),
    (-2.227, 0.449, 0.622),
    (-2.410, 0.731, 0.782),
    (-2.398, 0.401, 0.548),
    (-1.964, 0.281, 0.448),
]
RATE_OF_1E_2 = [
    (-2.878, 1.360, 0.785),
    (-3.076, 1.764, 1.039),
    (-3.048, 1.159, 1.288),
    (-2.976, 1.077, 2.992),
    (-3.151, 0.036, 0.256),
    (-7.376, 0.0, 0.001),
    (-13.740, 0.0, 0.0),
    (-20.587, 0.0, 0.0),
    (-23.430, 0.0, 0.0),
    (-24.374, 0.0, 0.0),
    (-27.824, 0.0, 0.0),
    (-28.830, 0.0, 0.0),
    (-31.345, 0.0, 0.0),
    (-30.200, 0.0, 0.0),
]
RATE_OF_1E6 = [
    (-2.878, 1.360, 0.785),
    (-3.076, 1.764, 1.039),
    (-34.328, 0.027, 317.373),
    *[(-10.803, 1.313, 0.0)] * 11,
]


def metrics_of(chosen: float, loss: float = 1.3, norm: float = 1.0) -> dict[str, float]:
    return {"logps/chosen": chosen, "loss": loss, "grad_norm": norm, "rewards/margins": 0.0}


def warnings_of(steps: Sequence[tuple[float, ...]]) -> list[tuple[int, str]]:
    """(step, warning) of a watch that receives these steps."""
    watch = CollapseWatch()
    return [
        (number, warning)
        for number, step in enumerate(steps, 1)
        for warning in watch.add_step(metrics_of(*step))
    ]


# --- real runs -------------------------------------------------------------------------------


def test_the_real_runs_that_went_well_have_no_warning() -> None:
    rows = json.loads(REAL_RUN.read_text("utf-8"))["steps"]
    steps = [(r["logps/chosen"], r["loss"], r["grad_norm"]) for r in rows if "loss" in r]
    assert len(steps) == 60
    assert warnings_of(steps) == []
    assert warnings_of(HEALTHY) == []


@pytest.mark.parametrize(
    ("steps", "at", "fall"), [(RATE_OF_1E_2, 7, "2.2"), (RATE_OF_1E6, 6, "9.1")]
)
def test_a_learning_rate_that_is_too_high_is_noticed_within_a_few_steps(
    steps: list[tuple[float, ...]], at: int, fall: str
) -> None:
    ((step, warning),) = warnings_of(steps)
    assert step == at
    assert warning.startswith(
        f"the chosen responses have become {fall} nats per token less likely (logps/chosen is "
    )
    assert warning.endswith(
        "was -3.0 at the beginning); the model may be degenerating: lower train.learning_rate, "
        "raise objective.beta, or set objective.sft_weight above 0"
    )


# --- planted divergences ---------------------------------------------------------------------


def healthy(seed: int, count: int) -> Iterator[tuple[float, float, float]]:
    """Steps of a run that goes well, of any batch size, beta and dataset."""
    rng = np.random.default_rng(seed)
    pairs = int(rng.choice([1, 2, 4, 8, 16, 32]))
    spread, beta = rng.choice([0.3, 0.6, 1.5]), rng.choice([2.0, 2.5, 10.0])
    trend, heavy_tails = rng.uniform(-0.4, 0.3), rng.random() < 0.5
    norm_spread = math.sqrt(0.25 + 0.5 / pairs)

    shape = (2, count, pairs)
    noise = rng.standard_t(4, shape) / math.sqrt(2) if heavy_tails else rng.standard_normal(shape)
    done = np.arange(count)[:, None] / count
    chosen = -1.8 + trend * done + spread * noise[0]
    margins = beta * (0.1 + 0.3 * done + 0.5 * noise[1])
    losses = np.logaddexp(0, beta / 2 - margins)
    norms = np.exp(norm_spread * rng.standard_normal(count))
    yield from zip(
        chosen.mean(axis=1).tolist(), losses.mean(axis=1).tolist(), norms.tolist(), strict=True
    )


def test_healthy_runs_never_warn() -> None:
    assert {seed: w for seed in range(1000) if (w := warnings_of(list(healthy(seed, 50))))} == {}


Divergence = Callable[[int, tuple[float, float, float]], tuple[float, float, float]]

DIVERGENCES: dict[str, tuple[str, Divergence]] = {
    "a slow fall": (
        "the chosen responses have become",
        lambda late, step: (step[0] - 0.1 * late, *step[1:]),
    ),
    "a sudden fall": (
        "the chosen responses have become",
        lambda late, step: (step[0] - 8.0, *step[1:]),
    ),
    "exploding gradients": (
        "the gradient's norm has jumped to",
        lambda late, step: (*step[:2], 1000 * step[2]),
    ),
    "a rising loss": (
        "the loss has been above",
        lambda late, step: (step[0], step[1] + late, step[2]),
    ),
}


@pytest.mark.parametrize(
    ("name", "start"),
    [
        *[(name, 60) for name in DIVERGENCES],
        *[(name, 3) for name in DIVERGENCES if name != "exploding gradients"],
        ("a slow fall", 0),
        ("a rising loss", 0),
    ],
)
def test_a_planted_divergence_is_warned_about_once(name: str, start: int) -> None:
    text, change = DIVERGENCES[name]
    for seed in range(20):
        steps = list(healthy(seed, 160))
        changed = [
            step if number <= start else change(number - start, step)
            for number, step in enumerate(steps)
        ]
        results = warnings_of(changed)
        assert len(results) == 1, seed
        assert results[0][1].startswith(text)
        assert results[0][0] > start
        assert "lower train.learning_rate, raise objective.beta" in results[0][1]


def test_a_fall_that_has_been_overcome_is_warned_about_again() -> None:
    good, bad = [(-1.0, 1.3, 1.0)] * 30, [(-4.0, 1.3, 1.0)] * 30
    assert [step for step, _ in warnings_of(good + bad + good + bad)] == [34, 94]


def test_a_fall_that_stays_at_the_limit_is_warned_about_once() -> None:
    steps = [(-1.0, 1.3, 1.0)] * 20
    steps += [(-2.0 - 0.1 * (-1) ** (i // 15), 1.3, 1.0) for i in range(200)]
    assert len(warnings_of(steps)) == 1


def test_one_step_alone_is_no_divergence() -> None:
    steps = [(-1.0, 1.3, 1.0)] * 60
    steps[30] = (-2.5, 50.0, 1000.0)
    steps[45] = (-2.5, 50.0, 1000.0)
    assert warnings_of(steps) == []


def test_a_run_that_has_learned_its_pairs_may_have_small_gradients_that_vary() -> None:
    steps = [(-1.0, 1.3, 1.0)] * 10
    steps += [(-1.0, 0.01, 1.5 if i % 3 == 0 else 1e-4) for i in range(100)]
    assert warnings_of(steps) == []


def test_a_loss_that_begins_at_0_may_rise_to_1() -> None:
    assert warnings_of([(-1.0, 0.0, 1.0)] * 10 + [(-1.0, 0.9, 1.0)] * 50) == []
    ((step, warning),) = warnings_of([(-1.0, 0.0, 1.0)] * 10 + [(-1.0, 1.1, 1.0)] * 50)
    assert step == 20
    assert warning.startswith(
        "the loss has been above 1.00 for 10 steps in a row, and was 0.00 at the beginning; "
    )


# --- its parts -------------------------------------------------------------------------------


def test_the_beginning_ends_at_a_sudden_fall_that_lasts() -> None:
    assert before_fall([-1.0, -1.2, -9.0, -8.0]) == [-1.0, -1.2]
    assert before_fall([-1.0, -1.2, -9.0, -1.1]) == [-1.0, -1.2, -9.0, -1.1]
    assert before_fall([-1.0]) == [-1.0]


def test_noise_is_measured_in_spite_of_a_trend_and_a_fall() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.5, 2000) - 0.001 * np.arange(2000) - 20.0 * (np.arange(2000) > 1000)
    assert step_noise(values.tolist()) == pytest.approx(0.5, rel=0.05)


# --- state -----------------------------------------------------------------------------------

FINITE = st.floats(-1e300, 1e300, allow_nan=False)
STEPS = st.lists(
    st.tuples(
        st.floats(-30, 0) | FINITE, st.floats(0, 9) | FINITE, st.floats(0, 1e308) | st.just(0.0)
    ),
    max_size=90,
)


@given(steps=STEPS, data=st.data())
@settings(deadline=None)
def test_a_restored_watch_is_one_that_was_never_interrupted(
    steps: list[tuple[float, ...]], data: st.DataObject
) -> None:
    cut = data.draw(st.integers(0, len(steps)))
    first = CollapseWatch()
    for step in steps[:cut]:
        first.add_step(metrics_of(*step))
    second = CollapseWatch()
    second.add_step(metrics_of(-5.0))  # what it had before is gone
    second.restore(json.loads(json.dumps(first.state())))
    for step in steps[cut:]:
        assert second.add_step(metrics_of(*step)) == first.add_step(metrics_of(*step))
    assert second.state() == first.state()


def test_a_restored_watch_does_not_repeat_itself() -> None:
    first = CollapseWatch()
    for step in RATE_OF_1E6[:8]:
        first.add_step(metrics_of(*step))
    second = CollapseWatch()
    second.restore(first.state())
    assert [second.add_step(metrics_of(*step)) for step in RATE_OF_1E6[8:]] == [[]] * 6


def test_the_state_does_not_grow() -> None:
    watch = CollapseWatch()
    sizes = set()
    for step in range(300):
        watch.add_step(metrics_of(-1.0))
        sizes |= {len(json.dumps(watch.state()))} if step >= 50 else set()
    assert len(sizes) == 1


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"first": 3, "recent": [], "active": []},
        {"first": [], "recent": [[1.0, 2.0]], "active": []},
        {"first": [], "recent": [[1.0, 2.0, "x"]], "active": []},
        {"first": [], "recent": [], "active": None},
    ],
)
def test_a_damaged_state_is_an_error(state: dict) -> None:
    with pytest.raises(SimPOError, match="the saved state of the collapse watch is damaged"):
        CollapseWatch().restore(state)
