"""MLX's random state: put aside, and set again."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_simpo.randomness import random_state, seeded


def draw() -> list[float]:
    return np.array(mx.random.normal((4,))).tolist()


def test_numbers_are_those_of_the_seed_and_go_on_as_before() -> None:
    mx.random.seed(5)
    draw()
    before = random_state()
    expected_next = draw()
    mx.random.seed(9)
    expected_inside = draw()
    mx.random.seed(5)
    draw()
    with seeded(9):
        assert draw() == expected_inside
    assert (random_state() == before).all()
    assert draw() == expected_next


def test_an_error_restores_the_state_as_well() -> None:
    before = random_state()
    with pytest.raises(IndexError), seeded(9):
        draw().pop(4)
    assert (random_state() == before).all()
