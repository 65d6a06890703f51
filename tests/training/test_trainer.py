"""One step, many steps: exact accumulation, torch's AdamW, the schedules, clipping, NaN."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers.tiny import some_pairs, tiny_model, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map

from mlx_simpo import DataConfig, LoRAConfig, ObjectiveConfig, SimPOConfig, SimPOError, TrainConfig
from mlx_simpo.data.encode import EncodedPair, Encoder, encode_pairs
from mlx_simpo.data.records import Pair
from mlx_simpo.engine.choice import REFERENCE, Engine, shared_prefix_engine
from mlx_simpo.model.lora import attach_lora
from mlx_simpo.training.optimizer import learning_rate_schedule
from mlx_simpo.training.step import GradientFunction, make_step, step_gradients
from mlx_simpo.training.trainer import total_steps, train_steps


def encoded_pairs(count: int) -> list[EncodedPair]:
    pairs = [Pair(**p, index=i, source=f"pairs:{i + 1}") for i, p in enumerate(some_pairs(count))]
    encoded, refused = encode_pairs(Encoder(tiny_tokenizer(), DataConfig()), pairs)
    assert not refused
    return encoded


PAIRS = encoded_pairs(11)


def model_with_lora(**lora: object) -> nn.Module:
    model = tiny_model()
    attach_lora(model, LoRAConfig(rank=4, **lora), seed=1)  # type: ignore[arg-type]
    model.update(tree_map(lambda p: p + 0.02, model.trainable_parameters()))
    return model


def weights(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(p) for name, p in tree_flatten(model.trainable_parameters())}


def config(**train: object) -> SimPOConfig:
    defaults: dict = {"batch_size": 4, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    return SimPOConfig(model="tiny", train=TrainConfig(**(defaults | train)))


def gradients(
    model: nn.Module,
    parts: list[list[EncodedPair]],
    engine: Engine = REFERENCE,
    *,
    compiled: bool = False,
    **objective: object,
) -> dict[str, np.ndarray]:
    """Loss and gradient of one step made of ``parts``."""
    options = {"beta": 2.0, "gamma_beta_ratio": 0.5, **objective}
    model.train()
    function = GradientFunction(model, options, engine, compiled=compiled)
    edges = np.cumsum([0, *map(len, parts)])
    plan = [list(range(a, b)) for a, b in pairwise(edges.tolist())]
    as_given = engine._replace(plan=lambda *_: plan)
    step = make_step([pair for part in parts for pair in part], as_given, TrainConfig())
    metrics, found = step_gradients(function, step)
    loss = {"loss": np.concatenate([np.array(part["loss"]) for part in metrics]).mean()}
    return loss | {name: np.array(g) for name, g in tree_flatten(found)}


def assert_close(found: dict, expected: dict, rtol: float = 2e-4) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=0, atol=rtol * scale, err_msg=name)


@given(
    cuts=st.lists(st.integers(1, 10), max_size=4),
    order=st.permutations(range(11)),
    sft_weight=st.sampled_from([0.0, 0.5]),
)
@settings(deadline=None, max_examples=15)
def test_any_split_of_a_step_gives_the_same_gradient(
    cuts: list[int], order: list[int], sft_weight: float
) -> None:
    """Unequal micro-batches, any order: loss and gradient are those of the one large batch."""
    model = model_with_lora()
    shuffled = [PAIRS[i] for i in order]
    edges = [0, *sorted(set(cuts)), 11]
    parts = [shuffled[a:b] for a, b in pairwise(edges)]
    expected = gradients(model, [PAIRS], sft_weight=sft_weight)
    for engine in (REFERENCE, shared_prefix_engine(model)):
        assert_close(gradients(model, parts, engine, sft_weight=sft_weight), expected)


def test_an_unweighted_mean_over_unequal_parts_would_be_noticed() -> None:
    """The planted bug, and TRL's at the time: each micro-batch's mean, averaged."""
    model = model_with_lora()
    expected = gradients(model, [PAIRS])
    means = [gradients(model, [part]) for part in (PAIRS[:8], PAIRS[8:])]
    wrong = {name: (means[0][name] + means[1][name]) / 2 for name in expected}
    with pytest.raises(AssertionError):
        assert_close(wrong, expected)


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge"])
def test_compiled_equals_eager(loss_type: str) -> None:
    model, parts = model_with_lora(), [PAIRS[:4], PAIRS[4:8], PAIRS[8:]]
    expected = gradients(model, parts, loss_type=loss_type)
    assert_close(gradients(model, parts, compiled=True, loss_type=loss_type), expected, 1e-5)


def test_gradient_is_the_slope_of_the_loss() -> None:
    model = model_with_lora()
    name = "model.layers.1.self_attn.v_proj.lora_a"
    found = gradients(model, [PAIRS])[name]
    start = weights(model)[name]
    place = np.unravel_index(np.abs(found).argmax(), found.shape)
    losses = []
    for step in (5e-3, -5e-3):
        moved = start.copy()
        moved[place] += step
        model.load_weights([(name, mx.array(moved))], strict=False)
        losses.append(float(gradients(model, [PAIRS])["loss"]))
    assert found[place] == pytest.approx((losses[0] - losses[1]) / 1e-2, rel=2e-2)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 8), (2, 4), (3, 3)])
def test_training_does_not_depend_on_the_micro_batches(batch_size: int, accumulation: int) -> None:
    """Whole runs over two epochs, the last step of each with the pairs that are left."""
    size = batch_size * accumulation
    plain, split = model_with_lora(), model_with_lora()
    whole = list(train_steps(plain, PAIRS, config(batch_size=size, epochs=2.0)))
    parts = list(
        train_steps(
            split,
            PAIRS,
            config(batch_size=batch_size, gradient_accumulation_steps=accumulation, epochs=2.0),
        )
    )
    assert [s.metrics["pairs"] for s in parts] == [size, 11 - size] * 2
    for a, b in zip(whole, parts, strict=True):
        assert a.metrics["loss"] == pytest.approx(b.metrics["loss"], rel=1e-4)
    for name, value in weights(plain).items():
        np.testing.assert_allclose(weights(split)[name], value, atol=2e-5, err_msg=name)


def numpy_adamw(w: np.ndarray, gradients: list, rates: list[float], decay: float) -> np.ndarray:
    """torch.optim.AdamW's update in float64 (Loshchilov and Hutter, algorithm 2)."""
    m, v, w = np.zeros_like(w), np.zeros_like(w), w.astype(np.float64)
    for step, (g, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        w = w * (1 - rate * decay)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        w -= rate * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    return w


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_updates_are_adamw_on_the_clipped_gradient(decay: float) -> None:
    """Three steps, replayed in NumPy from gradients taken at each step's weights."""
    options = config(steps=3, batch_size=11, weight_decay=decay, max_grad_norm=0.5)
    model, replay = model_with_lora(), model_with_lora()
    start, seen, rates = weights(model), [], []
    for step in train_steps(model, PAIRS, options):
        found = gradients(replay, [PAIRS])
        found.pop("loss")
        norm = math.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in found.values()))
        assert step.metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
        assert norm > 0.5  # clipping has something to do
        seen.append({n: g.astype(np.float64) * 0.5 / norm for n, g in found.items()})
        rates.append(step.metrics["learning_rate"])
        replay.update(model.trainable_parameters())
    assert rates[0] == 0 < rates[1]  # the warm-up begins at 0, as in transformers
    for name, value in weights(model).items():
        expected = numpy_adamw(start[name], [s[name] for s in seen], rates, decay)
        np.testing.assert_allclose(value, expected, atol=3e-7, err_msg=name)


def transformers_factor(schedule: str, step: int, warmup: int, steps: int) -> float:
    """The factors of transformers.get_{cosine,linear,constant}_schedule_with_warmup."""
    if step < warmup:
        return step / warmup
    done = (step - warmup) / (steps - warmup)
    return {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[
        schedule
    ]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize(("steps", "ratio"), [(40, 0.1), (7, 0.0), (9, 0.5), (1, 0.1)])
def test_schedule_is_that_of_transformers(schedule: str, steps: int, ratio: float) -> None:
    options = TrainConfig(schedule=schedule, warmup_ratio=ratio, learning_rate=3e-4)  # type: ignore[arg-type]
    rate = learning_rate_schedule(options, steps)
    warmup = math.ceil(ratio * steps) if steps > 1 else 0  # a run of one step trains too
    for step in range(steps):
        expected = 3e-4 * transformers_factor(schedule, step, warmup, steps)
        found = float(rate(mx.array(step, mx.uint64)))
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-10)


@pytest.mark.parametrize(
    ("train", "pairs", "expected"),
    [
        ({}, 11, 3),
        ({"epochs": 2.0}, 11, 6),
        ({"epochs": 0.5}, 11, 2),
        ({"steps": 7}, 11, 7),
        ({"batch_size": 4, "gradient_accumulation_steps": 2}, 16, 2),
    ],
)
def test_number_of_steps(train: dict, pairs: int, expected: int) -> None:
    options = config(**train).train
    assert total_steps(options, pairs) == expected
    assert (
        len(list(train_steps(model_with_lora(), encoded_pairs(pairs), config(**train)))) == expected
    )


def test_each_epoch_takes_every_pair_once_in_another_order() -> None:
    seen: list[int] = []

    def watched(pairs: Sequence[EncodedPair]) -> tuple:
        seen.extend(p.index for p in pairs)
        return REFERENCE.collate(pairs)

    engine = REFERENCE._replace(collate=watched)
    list(train_steps(model_with_lora(), PAIRS, config(epochs=2.0), engine))
    first, second = seen[:11], seen[11:]
    assert sorted(first) == sorted(second) == list(range(11))
    assert first != second


def test_the_seed_decides_everything() -> None:
    def run(seed: int) -> dict[str, np.ndarray]:
        model = model_with_lora(dropout=0.3)
        list(train_steps(model, PAIRS, replace(config(steps=3), seed=seed)))
        return weights(model)

    first, same, other = run(1), run(1), run(2)
    assert all((first[n] == same[n]).all() for n in first)
    assert any((first[n] != other[n]).any() for n in first)


@pytest.mark.parametrize("compiled", [False, True])
def test_nan_stops_names_step_and_pairs_and_keeps_the_weights(compiled: bool) -> None:
    """A pair whose tokens hit a poisoned embedding row appears in the second step."""
    model = model_with_lora()
    steps = train_steps(model, PAIRS, config(engine="reference", compile=compiled))
    next(steps)
    kept = weights(model)
    embedding = np.array(model.model.embed_tokens.weight)
    embedding[PAIRS[0].chosen.tokens[0]] = np.nan  # every pair begins with this token
    model.model.embed_tokens.weight = mx.array(embedding)
    with pytest.raises(SimPOError, match=r"loss of step 2 .*pairs:\d+, pairs:\d+.*learning_rate"):
        next(steps)
    assert all((kept[n] == w).all() for n, w in weights(model).items())


def test_training_prefers_the_chosen_answers() -> None:
    model = model_with_lora()
    objective = ObjectiveConfig()
    run = replace(config(steps=25, batch_size=11, learning_rate=1e-2), objective=objective)
    steps = list(train_steps(model, PAIRS, run))
    assert steps[-1].metrics["loss"] < 0.5 * steps[0].metrics["loss"]
    assert steps[-1].metrics["rewards/accuracies"] == 1


def test_metrics_of_a_step() -> None:
    step = next(train_steps(model_with_lora(), PAIRS, config(batch_size=11)))
    metrics = step.metrics
    assert metrics["rewards/margins"] == pytest.approx(
        metrics["rewards/chosen"] - metrics["rewards/rejected"], abs=1e-5
    )
    assert metrics["rewards/chosen"] == pytest.approx(2 * metrics["logps/chosen"], rel=1e-6)
    assert metrics["tokens"] == sum(len(p.chosen.tokens) + len(p.rejected.tokens) for p in PAIRS)
    assert (step.step, step.total_steps, step.epoch) == (1, 1, 1.0)
    assert step.as_dict()["step"] == 1
