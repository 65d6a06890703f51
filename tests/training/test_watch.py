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


# --- the limits ------------------------------------------------------------------------------

# Values that go up and down by so much have a noise of 0.2 by `step_noise`, whatever falls.
SWING = 0.1 * 0.954


def swinging(count: int, by: float = SWING) -> list[float]:
    return [by if i % 2 else -by for i in range(count)]


@pytest.mark.parametrize(
    ("swing", "limit"), [(0.0, 1.0), (SWING, 1.0 + 5 * 0.2 * math.sqrt(1 / 10 + 1 / 10))]
)
def test_a_fall_is_one_of_a_nat_and_five_deviations_of_the_means(
    swing: float, limit: float
) -> None:
    for fall, expected in ((0.99 * limit, 0), (1.01 * limit, 1)):
        levels = [-1.0] * 10 + [-1.0 - fall] * 10
        steps = [(a + b,) for a, b in zip(levels, swinging(20, swing), strict=True)]
        assert len(warnings_of(steps)) == expected


def test_a_fall_has_passed_when_half_of_the_limit_is_left() -> None:
    for left, expected in ((0.51, 1), (0.49, 2)):
        levels = [-1.0, -3.0, -1.0 - left, -3.0]
        assert len(warnings_of([(level,) for level in levels for _ in range(20)])) == expected


def test_five_steps_are_enough_for_a_fall_and_four_are_not() -> None:
    assert warnings_of([(-1.0,), (-1.0,), (-9.0,), (-9.0,)]) == []
    ((step, warning),) = warnings_of([(-1.0,), (-1.0,), (-9.0,), (-9.0,), (-9.0,)])
    assert step == 5
    assert "5.8 in the last 5 steps and was -1.0 at the beginning" in warning


@pytest.mark.parametrize(
    ("noise", "limit"),
    [
        (0.0, 10.0),
        (0.5, 10.0 * math.cosh(0.5 * 0.954 / 2)),
        (1.0, math.exp(3.0) * math.cosh(0.954 / 2)),
    ],
)
def test_a_norm_jumps_by_ten_times_or_three_deviations_of_its_logarithm(
    noise: float, limit: float
) -> None:
    """Three times within ten steps; of an even number of norms the median is between two."""
    usual = [math.exp(log) for log in swinging(50, noise * 0.954 / 2)]
    for jump, at, expected in (
        (0.95 * limit, (31, 37, 39), 0),
        (1.05 * limit, (31, 37, 39), 1),
        (1.05 * limit, (29, 37, 39), 0),
        (1.05 * limit, (37, 39), 0),
    ):
        norms = [jump if number in at else norm for number, norm in enumerate(usual)]
        assert len(warnings_of([(-1.0, 1.3, norm) for norm in norms])) == expected, (jump, at)


def test_norms_that_are_zero_have_a_usual_one_all_the_same() -> None:
    for jump, expected in ((9e-12, 0), (1.1e-11, 1)):
        norms = [0.0] * 20 + [jump] * 3
        assert len(warnings_of([(-1.0, 1.3, norm) for norm in norms])) == expected


def test_jumps_are_warned_about_again_when_the_history_has_none() -> None:
    jumps = [(-1.0, 1.3, 100.0)] * 3
    for between, expected in ((49, 1), (50, 2)):
        steps = [(-1.0, 1.3, 1.0)] * 20 + jumps + [(-1.0, 1.3, 2.0)] * between + jumps
        warnings = warnings_of(steps)
        assert len(warnings) == expected
        assert warnings[0][1].startswith(
            "the gradient's norm has jumped to 100, and was far above its usual 1 in 3 of the last "
            "10 steps; "
        )


def test_a_run_degenerates_as_long_as_a_warning_has_not_passed() -> None:
    watch, states = CollapseWatch(), []
    for level in (-1.0, -3.0, -1.0):
        for _ in range(20):
            watch.add_step(metrics_of(level))
        states.append(watch.is_degenerating)
    assert states == [False, True, False]


def test_the_usual_norm_is_of_the_steps_before_a_sudden_fall() -> None:
    """Four steps of a norm of 1, after which the model is destroyed and its gradients are huge."""
    steps = [(-1.0, 1.3, 1.0)] * 4 + [(-9.0, 1.3, 1e-6)] * 30 + [(-9.0, 1.3, 11.0)] * 3
    assert [warning[:20] for _, warning in warnings_of(steps)][1:] == ["the gradient's norm "]


def test_a_loss_is_far_above_the_first_ones_when_it_is_more_than_twice_as_high() -> None:
    levels = [1.5, 3.0, 3.125, 3.0, 3.125, 2.0, 3.125]
    steps = [(-1.0, level) for level in levels for _ in range(10)]
    assert [step for step, _ in warnings_of(steps)] == [30, 50, 70]
    # Nine steps are not enough, for a warning and for its end.
    assert [step for step, _ in warnings_of(steps[:29] + steps[30:50])] == [49]
    assert [step for step, _ in warnings_of(steps[:39] + steps[40:50])] == [30]


# --- its parts -------------------------------------------------------------------------------


def test_the_beginning_ends_at_a_sudden_fall_that_lasts() -> None:
    assert before_fall([-1.0, -1.2, -9.0, -8.0]) == [-1.0, -1.2]
    assert before_fall([-1.0, -1.2, -9.0, -1.1]) == [-1.0, -1.2, -9.0, -1.1]
    assert before_fall([-1.0, -4.0]) == [-1.0, -4.0]
    assert before_fall([-1.0, -4.125]) == [-1.0]
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


def test_the_state_has_ten_first_steps_and_the_last_fifty() -> None:
    watch, steps = CollapseWatch(), [[-1.0, 1.3, 1.0 + i / 100] for i in range(70)]
    for step in steps:
        watch.add_step(metrics_of(*step))
    assert watch.state() == {"first": steps[:10], "recent": steps[-50:], "active": []}


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
