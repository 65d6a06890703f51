"""The largest micro-batch, compared with those of all steps."""

from itertools import islice
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers.steps import step_config
from helpers.tiny import tiny_model, token_pair

from mlx_simpo import SimPOConfig
from mlx_simpo.data.encode import EncodedPair
from mlx_simpo.data.mixing import epoch_order
from mlx_simpo.data.tokens import TokenizedPairs, TokenWriter
from mlx_simpo.engine.choice import REFERENCE, Engine, shared_prefix_engine
from mlx_simpo.engine.figures import CPU, GPU
from mlx_simpo.planning import largest
from mlx_simpo.planning.largest import ATTENTION_TOKENS, PLANNED_STEPS, largest_micro_batch

ENGINES = {
    "reference": REFERENCE,
    "shared_prefix": shared_prefix_engine(tiny_model(), figures=CPU),
    "shared_prefix of a GPU": shared_prefix_engine(tiny_model(), figures=GPU),
}


def some_pairs(number: int, longest: int = 80) -> list[EncodedPair]:
    """Pairs of random lengths, most of them short."""
    rng = np.random.default_rng(number)
    lengths = 1 + (longest * rng.random((number, 3)) ** 2).astype(int)
    return [token_pair(*sizes, seed=i) for i, sizes in enumerate(lengths.tolist())]


def all_micro_batches(
    pairs: list[EncodedPair], config: SimPOConfig, engine: Engine, steps: int
) -> list[list[EncodedPair]]:
    options = config.train
    result = []
    for order in islice(epoch_order(pairs, config.seed).steps(options.step_pairs), steps):
        members = [pairs[i] for i in order]
        plan = engine.plan(members, options.batch_size, options.max_tokens_per_step)
        result += [[members[i] for i in indices] for indices in plan]
    return result


def size(part: list[EncodedPair], engine: Engine) -> float:
    positions = engine.collate(part).positions
    return positions * (1 + max(pair.length for pair in part) / ATTENTION_TOKENS)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 1},
        {"batch_size": 4, "gradient_accumulation_steps": 4},
        {"batch_size": 8, "gradient_accumulation_steps": 2, "max_tokens_per_step": 300},
    ],
    ids=str,
)
def test_no_micro_batch_of_the_run_is_larger_by_much(
    options: dict[str, int], engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(largest, "PLANNED_STEPS", 12)
    pairs, config = some_pairs(400), step_config(**options)
    steps = 2 * len(pairs) // config.train.step_pairs
    everything = all_micro_batches(pairs, config, ENGINES[engine], steps)
    expected = max(size(part, ENGINES[engine]) for part in everything)
    result = largest_micro_batch(pairs, config, ENGINES[engine], steps)
    # Of 50 steps and more, up to 24 are planned here; the rankings do not know what a prompt saves,
    # nor how a step's pairs are arranged.
    assert size(result.pairs, ENGINES[engine]) >= 0.97 * expected
    assert result.positions == ENGINES[engine].collate(result.pairs).positions


def test_the_longest_pair_and_its_step_are_named() -> None:
    pairs = [*some_pairs(30), token_pair(100, 300, 200)]
    config = step_config(batch_size=2, gradient_accumulation_steps=2)
    result = largest_micro_batch(pairs, config, ENGINES["shared_prefix"], 8)
    assert result.longest is pairs[-1]
    order = list(islice(epoch_order(pairs, config.seed).steps(4), 8))[result.step - 1]
    assert 30 in order
    assert not result.is_alone


def test_only_steps_of_the_run_count() -> None:
    pairs = some_pairs(32)
    config = step_config(batch_size=4)
    by_step = list(islice(epoch_order(pairs, config.seed).steps(4), 8))
    last = by_step[-1][0]
    pairs[last] = token_pair(100, 300, 200)
    engine = ENGINES["reference"]
    assert largest_micro_batch(pairs, config, engine, 8).longest is pairs[last]
    assert largest_micro_batch(pairs, config, engine, 7).longest is not pairs[last]
    assert largest_micro_batch(pairs, config, engine, 1).step == 1


def test_one_micro_batch_per_step_is_alone() -> None:
    config = step_config(batch_size=4)
    assert largest_micro_batch(some_pairs(6), config, ENGINES["reference"], 2).is_alone


def test_prompts_that_differ_share_less_than_their_lengths_say() -> None:
    pair = token_pair(50, 20, 20)
    pair.rejected.tokens[10] += 1  # as with data.compat=official
    result = largest_micro_batch([pair], step_config(), ENGINES["shared_prefix"], 1)
    assert result.positions == 10 + 2 * (69 - 10)


def test_few_steps_are_planned() -> None:
    planned = []

    def plan(*arguments: object) -> list[list[int]]:
        planned.append(arguments)
        return REFERENCE.plan(*arguments)  # type: ignore[arg-type]

    engine = REFERENCE._replace(plan=plan)
    largest_micro_batch(some_pairs(2000, 9), step_config(), engine, 500)
    assert len(planned) <= 2 * PLANNED_STEPS + 1


def test_runs_of_many_epochs_are_looked_at_from_their_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(largest, "MAX_RANKED_PAIRS", 20)
    result = largest_micro_batch(some_pairs(12), step_config(), REFERENCE, 10**9)
    assert result.step <= 5


def test_of_pairs_on_the_disk_one_steps_tokens_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = some_pairs(300)
    with TokenWriter(tmp_path) as writer:
        for pair in pairs:
            writer.add(pair, b"")
    read = []
    get = TokenizedPairs.__getitem__

    def counted(self: TokenizedPairs, index: int) -> EncodedPair:
        read.append(index)
        return get(self, index)

    monkeypatch.setattr(TokenizedPairs, "__getitem__", counted)
    config, engine = step_config(batch_size=4), ENGINES["shared_prefix"]
    on_disk = largest_micro_batch(TokenizedPairs(tmp_path), config, engine, 75)
    assert len(read) == 4
    in_memory = largest_micro_batch(pairs, config, engine, 75)
    assert (on_disk.step, on_disk.positions) == (in_memory.step, in_memory.positions)


def test_nothing_is_computed() -> None:
    before = mx.get_active_memory()
    largest_micro_batch(some_pairs(50), step_config(), REFERENCE, 12)
    assert mx.get_active_memory() == before
