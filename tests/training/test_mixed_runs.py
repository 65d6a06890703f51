"""Runs on several sources, with several validation sets: what is logged, decided and resumed."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import captured_display, json_lines, small_run
from helpers.runs import Ran, assert_same_run, finish, snapshots
from helpers.tiny import some_pairs, write_jsonl

from mlx_simpo import SimPOConfig, SimPOError, evaluate, load_config, prepare, resume_config
from mlx_simpo.data.mixing import Mixture
from mlx_simpo.data.order import pairs_per_epoch
from mlx_simpo.training.trainer import step_batches

SIZES, WEIGHTS = {"chat": 9, "code": 5, "safety": 12}, (2.0, 1.0, 1.0)
COUNTS = dict(zip(SIZES, pairs_per_epoch([*SIZES.values()], WEIGHTS), strict=True))  # 9, 4 or 5, 4


class Mixed:
    """Files of three sources and two validation sets, and runs on them below ``root``."""

    def __init__(self, model: Path, root: Path) -> None:
        self.model, self.root = model, root
        rows = some_pairs(sum(SIZES.values()) + 9)
        self.files: dict[str, Path] = {}
        for name, size in {**SIZES, "held": 4, "swapped": 5}.items():
            part, rows = rows[:size], rows[size:]
            if name == "swapped":
                part = [r | {"chosen": r["rejected"], "rejected": r["chosen"]} for r in part]
            self.files[name] = write_jsonl(root / f"{name}.jsonl", part)

    def config(self, name: str, *settings: str) -> SimPOConfig:
        """Two epochs of five steps, and one step more; three weights, two sets."""
        parts = zip(SIZES, WEIGHTS, strict=True)
        train = [{"path": str(self.files[n]), "weight": weight} for n, weight in parts]
        valid = {"held": str(self.files["held"]), "swapped": {"path": str(self.files["swapped"])}}
        more = (
            f"data.valid={json.dumps(valid)}",
            "lora.dropout=0.2",
            "train.steps=11",
            "train.eval_every=4",
            "train.save_every=1",
            *settings,
        )
        run = small_run(self.model, Path(json.dumps(train)), self.root / name, *more)
        return load_config(None, run)

    def begin(self, name: str, *settings: str) -> Ran:
        return finish(self.config(name, *settings))


@pytest.fixture(scope="module")
def mixed(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return Mixed(model_folder, tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def whole(mixed: Mixed, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ran, list[Path]]:
    """The whole run, and what a kill after each line of its log would have left of it."""
    with snapshots(tmp_path_factory.mktemp("killed")) as copies:
        ran = mixed.begin("whole")
    return ran, copies


def step_lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in json_lines(folder / "metrics.jsonl") if "learning_rate" in line]


# --- what is logged --------------------------------------------------------------------------


def test_every_epoch_has_the_shares_of_the_weights(whole: tuple[Ran, list[Path]]) -> None:
    """Counted in metrics.jsonl."""
    lines = step_lines(whole[0].result.adapter)
    per_epoch = -(-sum(COUNTS.values()) // 4)
    assert per_epoch == 5
    for epoch in (lines[:per_epoch], lines[per_epoch : 2 * per_epoch]):
        counted: Counter[str] = Counter()
        for line in epoch:
            parts = {k.removeprefix("pairs/"): n for k, n in line.items() if "pairs/" in k}
            assert parts.keys() == SIZES.keys()
            assert sum(parts.values()) == line["pairs"]
            counted.update(parts)
        assert counted == COUNTS
    assert [line["epoch"] for line in lines] == [round(n / per_epoch, 4) for n in range(1, 12)]


def test_the_summary_and_the_display_have_the_counts(whole: tuple[Ran, list[Path]]) -> None:
    ran, _ = whole
    summary = json.loads((ran.result.adapter / "summary.json").read_text("utf-8"))
    total = sum(COUNTS.values())
    expected = {
        name: {"pairs": SIZES[name], "quarantined": 0, "per_epoch": n, "share": n / total}
        for name, n in COUNTS.items()
    }
    assert summary["sources"] == expected
    assert summary["pairs"] == sum(SIZES.values())
    assert (
        f"chat: 9 pairs to train on, 0 records quarantined; an epoch takes 9 of them, "
        f"{9 / total:.1%} of the epoch" in ran.text
    )


def test_epochs_are_those_of_the_shares(mixed: Mixed) -> None:
    config = mixed.config("epochs", "train.steps=null", "train.epochs=3")
    assert prepare(config, captured_display()[0]).total_steps == 3 * 5


def test_one_source_has_no_counts_of_its_own(mixed: Mixed) -> None:
    ran = mixed.begin("one", f"data.train={mixed.files['chat']}", "train.steps=1")
    (line,) = step_lines(ran.result.adapter)
    assert not any(name.startswith("pairs/") for name in line)


# --- several validation sets -----------------------------------------------------------------


def test_each_set_has_its_metrics_and_its_table(whole: tuple[Ran, list[Path]]) -> None:
    ran, _ = whole
    lines = [x for x in json_lines(ran.result.adapter / "metrics.jsonl") if "eval/held/loss" in x]
    assert [line["step"] for line in lines] == [0, 4, 8, 11]
    for name, size in (("held", 4), ("swapped", 5)):
        both = ran.result.valid_sets[name]
        assert both.before is not None
        assert both.after is not None
        assert [len(e.pairs) for e in (both.before, both.after)] == [size, size]
        for line, evaluation in ((lines[0], both.before), (lines[-1], both.after)):
            logged = {k.removeprefix(f"eval/{name}/"): v for k, v in line.items() if name in k}
            assert logged == json.loads(json.dumps(evaluation.as_dict()))
        assert f"{name}: {size} pairs " in ran.text
    assert not any(name.startswith("eval_") for line in lines for name in line)
    assert "step 1 begins after an evaluation on 9 pairs; a smaller data.valid_max makes it" in (
        ran.text
    )


def test_the_result_is_that_of_the_main_set(mixed: Mixed, whole: tuple[Ran, list[Path]]) -> None:
    """The model learns the pairs, and so gets worse on the swapped ones."""
    first = whole[0].result
    second = mixed.begin("swapped-main", "data.valid_main=swapped").result
    for result, name in ((first, "held"), (second, "swapped")):
        assert (result.before, result.after) == result.valid_sets[name]
        lines = json_lines(result.adapter / "metrics.jsonl")
        losses = {
            line["step"]: line[f"eval/{name}/loss"]
            for line in lines
            if f"eval/{name}/loss" in line and line["step"]
        }
        assert result.best == min(losses, key=losses.__getitem__)
    assert first.best != second.best
    summary = json.loads((second.adapter / "summary.json").read_text("utf-8"))
    assert summary["before"] == summary["valid_sets"]["swapped"]["before"]
    assert summary["after"] == summary["valid_sets"]["swapped"]["after"]
    assert summary["valid_sets"].keys() == {"held", "swapped"}


def test_the_main_set_decides_when_to_stop_early(mixed: Mixed) -> None:
    patience = ("train.early_stopping.patience=1", "data.valid_main=swapped")
    result = mixed.begin("early", *patience).result
    assert result.stopped_early
    assert result.last.step == 4


def test_evaluate_has_all_pairs_of_all_sets(mixed: Mixed, whole: tuple[Ran, list[Path]]) -> None:
    """And not data.valid_max of them, as a training has."""
    result = whole[0].result
    config = mixed.config("whole", "data.valid_max=2")
    assert len(prepare(config, captured_display()[0]).valid) == 2
    evaluations = evaluate(config, result.adapter, captured_display()[0])
    assert evaluations.keys() == {"base/held", "base/swapped", "adapter/held", "adapter/swapped"}
    for name in ("held", "swapped"):
        before, after = result.valid_sets[name]
        assert before is not None
        assert after is not None
        assert evaluations[f"base/{name}"].metrics == pytest.approx(before.metrics, rel=1e-5)
        assert evaluations[f"adapter/{name}"].metrics == pytest.approx(after.metrics, rel=1e-5)


def test_the_same_pairs_are_evaluated_before_and_after(mixed: Mixed) -> None:
    ran = mixed.begin("limited", "data.valid_max=2", "train.steps=1")
    assert "step 1 begins after" not in ran.text  # the evaluation takes no longer than a step
    for both in ran.result.valid_sets.values():
        assert both.before is not None
        assert both.after is not None
        assert [p.source for p in both.before.pairs] == [p.source for p in both.after.pairs]
        assert len(both.before.pairs) == 2


# --- resuming --------------------------------------------------------------------------------


def test_a_run_that_is_killed_anywhere_ends_the_same(whole: tuple[Ran, list[Path]]) -> None:
    """Within an epoch, at its end, and between the sets' evaluations and the checkpoint."""
    ran, copies = whole
    assert len(copies) == 15  # 11 steps and 4 evaluations; steps 2, 5 (the last of an epoch) and 9
    for copy in (copies[2], copies[6], copies[12]):
        finish(resume_config(copy), resume=True)
        assert_same_run(copy, ran.result.adapter)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: (
                "data.train="
                + json.dumps(
                    [
                        {"path": source.path, "weight": 2 - ("chat" in source.path)}
                        for source in config.data.train
                    ]
                )
            ),
            "the training sources were chat (9 pairs, weight 2.0), code (5 pairs, weight 1.0), "
            "safety (12 pairs, weight 1.0) and are chat (9 pairs, weight 1.0), code (5 pairs, "
            "weight 2.0), safety (12 pairs, weight 2.0). Undo",
        ),
        (
            lambda config: f"data.train={json.dumps([s.path for s in config.data.train])}",
            "safety (12 pairs, weight 1.0) and are chat (9 pairs), code (5 pairs), safety (12 "
            "pairs). Undo",
        ),
        (
            lambda config: f"data.train={config.data.train[0].path}",
            "weight 1.0) and are a single one; the training pairs changed. Undo",
        ),
        (lambda config: "data.valid_main=swapped", "data.valid_main was None and is 'swapped'"),
        (
            lambda config: (
                "data.valid="
                + json.dumps({name: s.path for name, s in reversed(config.data.valid.items())})
            ),
            "the main validation set was held and is swapped. Undo",
        ),
        (
            lambda config: f"data.valid={json.dumps({'held': config.data.valid['held'].path})}",
            "data: the validation pairs changed. Undo",
        ),
    ],
    ids=["weights", "no weights", "one source", "main", "order of sets", "a set less"],
)
def test_other_sources_weights_or_sets_are_an_error(
    change: Callable[[Any], str], message: str, whole: tuple[Ran, list[Path]]
) -> None:
    _, copies = whole
    config = resume_config(copies[6])
    with pytest.raises(SimPOError) as error:
        finish(resume_config(copies[6], [change(config)]), resume=True)
    assert message in str(error.value)


def test_sources_may_move(whole: tuple[Ran, list[Path]], mixed: Mixed, tmp_path: Path) -> None:
    ran, copies = whole
    moved = [
        {
            "path": str(shutil.copy(mixed.files[name], tmp_path / f"{name}.moved.jsonl")),
            "weight": weight,
        }
        for name, weight in zip(SIZES, WEIGHTS, strict=True)
    ]
    finish(resume_config(copies[8], [f"data.train={json.dumps(moved)}"]), resume=True)
    assert_same_run(copies[8], ran.result.adapter)


def test_the_training_pairs_are_a_mixture_whose_parts_are_cached_alone(mixed: Mixed) -> None:
    display, text = captured_display()
    display.console.width = 1000
    session = prepare(mixed.config("cached"), display)
    assert isinstance(session.train, Mixture)
    assert text.getvalue().count("tokens are loaded from the cache in") == 5


def test_a_seed_gives_one_order_and_another_seed_another(mixed: Mixed) -> None:
    def order(seed: int) -> list[list[str]]:
        session = prepare(mixed.config("order", f"seed={seed}"), captured_display()[0])
        batches = step_batches(session.train, session.config, session.engine, 0, 11)
        return [[pair.source for pair in batch.pairs] for batch in batches]

    first = order(1)
    assert order(1) == first
    assert order(2) != first
    epochs = [{source for step in first[n : n + 5] for source in step} for n in (0, 5)]
    assert [len(epoch) for epoch in epochs] == [sum(COUNTS.values())] * 2
    assert epochs[0] != epochs[1]  # another part of safety
