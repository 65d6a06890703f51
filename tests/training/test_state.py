"""The state between two steps: continued exactly, restored after errors."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from helpers.kills import TIMES
from helpers.steps import encoded_pairs, model_with_lora, step_config, weights

from mlx_simpo import SimPOConfig, SimPOError
from mlx_simpo.randomness import random_state, set_random_state
from mlx_simpo.training.state import TrainingState, restore_on_error
from mlx_simpo.training.trainer import StepMetrics, total_steps, train_steps

PAIRS = encoded_pairs()

VARIANTS: dict[str, tuple[dict, dict]] = {
    "shared_prefix": ({}, {}),
    "reference, compiled": ({}, {"engine": "reference"}),
    "reference, eager": ({}, {"engine": "reference", "compile": False}),
    "checkpointing": ({}, {"gradient_checkpointing": True}),
    "dora": ({"dora": True}, {"weight_decay": 0.1}),
}


def begin(config: SimPOConfig, **lora: Any) -> tuple[Any, TrainingState]:
    """Return a model and the state before its first step."""
    model = model_with_lora(**lora)
    return model, TrainingState(model, config, total_steps(config, PAIRS))


def numbers(steps: Sequence[StepMetrics]) -> list[dict]:
    """Return what must be the same in two runs of these steps."""
    return [{k: v for k, v in s.as_dict().items() if k not in TIMES} for s in steps]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_training_that_is_saved_and_continued_is_the_same_bit_for_bit(
    stop: int, variant: str
) -> None:
    """With dropout, micro-batches, a warm-up, and three steps per epoch, so that 1 and 4 lie within
    an epoch and 6 at the end of one."""
    lora, train = VARIANTS[variant]
    config = step_config(batch_size=2, gradient_accumulation_steps=2, epochs=3.0, **train)
    whole_model, whole_state = begin(config, dropout=0.3, **lora)
    whole = list(train_steps(whole_model, PAIRS, config, None, whole_state))

    model, state = begin(config, dropout=0.3, **lora)
    steps = train_steps(model, PAIRS, config, None, state)
    first = [next(steps) for _ in range(stop)]
    saved = {name: np.array(a) for name, a in state.arrays().items()}
    trained = weights(model)

    mx.random.seed(999)  # another process has drawn nothing
    resumed_model, resumed = begin(config, dropout=0.3, **lora)
    resumed_model.load_weights([(n, mx.array(w)) for n, w in trained.items()], strict=False)
    resumed.restore({name: mx.array(a) for name, a in saved.items()}, stop, 0)
    rest = list(train_steps(resumed_model, PAIRS, config, None, resumed))

    assert numbers([*first, *rest]) == numbers(whole)
    for name, value in weights(whole_model).items():
        np.testing.assert_array_equal(weights(resumed_model)[name], value, err_msg=name)
    for name, value in whole_state.arrays().items():
        np.testing.assert_array_equal(resumed.arrays()[name], value, err_msg=name)


@pytest.mark.parametrize(
    "forgotten", ["random", "optimizer.step", "optimizer.model.layers.1.mlp.up_proj.lora_b.m"]
)
def test_forgetting_a_part_of_the_state_would_be_noticed(forgotten: str) -> None:
    """The negative control of the test above."""
    config = step_config(epochs=3.0)
    whole_model, state = begin(config, dropout=0.3)
    list(train_steps(whole_model, PAIRS, config, None, state))
    model, state = begin(config, dropout=0.3)
    steps = train_steps(model, PAIRS, config, None, state)
    for _ in range(4):
        next(steps)
    arrays = dict(state.arrays())
    assert forgotten in arrays
    fresh = begin(config, dropout=0.3)[1].arrays()
    state.restore({**arrays, forgotten: fresh[forgotten]}, 4, 0)
    list(train_steps(model, PAIRS, config, None, state))
    after = weights(model)
    assert any((after[name] != w).any() for name, w in weights(whole_model).items())


def test_random_numbers_drawn_between_steps_change_nothing() -> None:
    config = step_config(steps=4)
    plain, disturbed = (begin(config, dropout=0.3) for _ in range(2))
    list(train_steps(plain[0], PAIRS, config, None, plain[1]))
    for _ in train_steps(disturbed[0], PAIRS, config, None, disturbed[1]):
        mx.eval(mx.random.normal((3,)))
    for name, value in weights(plain[0]).items():
        np.testing.assert_array_equal(weights(disturbed[0])[name], value, err_msg=name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer.step": None}, "optimizer.step is missing and must be"),
        ({"random": mx.zeros((3,), mx.uint32)}, r"random is .*uint32 \(3,\) and must be"),
        (
            {"optimizer.model.layers.0.mlp.up_proj.lora_a.v": mx.zeros((2, 2))},
            r"lora_a.v is .*float32 \(2, 2\) and must be .*resume with the model",
        ),
    ],
)
def test_the_state_of_another_training_is_refused(change: dict, message: str) -> None:
    state = begin(step_config())[1]
    arrays = {k: v for k, v in {**state.arrays(), **change}.items() if v is not None}
    with pytest.raises(SimPOError, match=message):
        state.restore(arrays, 1, 0)


@pytest.mark.parametrize("seed", [0, 3, 2**31, 2**32 - 1])
def test_the_random_state_is_that_of_the_seed_and_can_be_set_again(seed: int) -> None:
    config = replace(step_config(), seed=seed)
    begin(config)[1].seed_random_numbers()
    ours = np.array(mx.random.normal((4,)))
    later = random_state()
    next_numbers = np.array(mx.random.normal((4,)))
    mx.random.seed(seed)
    np.testing.assert_array_equal(ours, np.array(mx.random.normal((4,))))
    set_random_state(later)
    np.testing.assert_array_equal(next_numbers, np.array(mx.random.normal((4,))))


def test_a_skipped_update_counts_as_a_step_of_the_schedule() -> None:
    state = begin(step_config(epochs=2.0))[1]
    before = {name: np.array(array) for name, array in state.arrays().items()}
    assert (state.step, state.skipped) == (0, 0)
    for count in (1, 2):
        state.skip_update()
        assert state.skipped == count
        after = {name: np.array(array) for name, array in state.arrays().items()}
        assert after.pop("optimizer.step") == before["optimizer.step"] + count
        assert all((after[name] == before[name]).all() for name in after)


# --- errors ------------------------------------------------------------------------------------


def test_an_error_restores_model_optimizer_and_random_numbers() -> None:
    config = replace(step_config(), seed=5)
    model, state = begin(config)
    before, moments = weights(model), {n: np.array(a) for n, a in state.arrays().items()}

    def fail() -> None:
        with restore_on_error(model, state):
            gradients = model.trainable_parameters()
            state.optimizer.update(model, gradients)
            model.layers[0].mlp.up_proj.lora_a = mx.array(0.0)
            mx.random.normal((3,))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    after = weights(model)
    assert after.keys() == before.keys()
    assert all((after[name] == value).all() for name, value in before.items())
    assert all((np.array(a) == moments[n]).all() for n, a in state.arrays().items())
    drawn = np.array(mx.random.normal((3,)))
    mx.random.seed(5)
    assert (drawn == np.array(mx.random.normal((3,)))).all()


def test_without_an_error_changes_stay() -> None:
    model, state = begin(step_config())
    with restore_on_error(model, state):
        model.layers[0].mlp.up_proj.lora_a = mx.array(7.0)
    assert model.layers[0].mlp.up_proj.lora_a.item() == 7
