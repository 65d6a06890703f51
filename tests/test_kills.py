"""Whole runs that are killed at an operation on a file, aborted in a step, or find the disk full:
resumed, they end as if nothing had happened. `benchmarks/kill_matrix.py` does this everywhere."""

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
from helpers.faults import Ended, Forks, missing
from helpers.kills import content, differences

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

SETUP = """
import os, sys
import mlx_simpo.api, mlx_simpo.training.run
from mlx_simpo.cli.main import run_command

def train(*arguments):
    status = run_command(["train", *arguments])
    sys.stdout.flush()
    os._exit(status)

def end_in_step(number, end):
    steps = []
    def note(metrics):
        steps.append(metrics)
        if len(steps) == number:
            end()
        return ""
    mlx_simpo.training.run.step_note = note

def abort_in_step(number):
    end_in_step(number, os.abort)

def kill_in_step(number):
    end_in_step(number, lambda: os.kill(os.getpid(), 9))
"""
# MLX must not have computed anything before a fork, so another process makes the inputs.
INPUTS = """
import mlx_simpo
import sys
from pathlib import Path
from helpers.tiny import some_pairs, tiny_folder, write_jsonl
tiny_folder(Path(sys.argv[1], "model"))
write_jsonl(Path(sys.argv[1], "pairs.jsonl"), some_pairs())
for name, count in (("a", 5), ("b", 12), ("c", 7), ("v", 3), ("w", 4)):
    write_jsonl(Path(sys.argv[1], f"{name}.jsonl"), some_pairs(count + 20)[20:])
"""
PARTS = 8  # of all operations, at the ends of which a run is killed


class Kills(NamedTuple):
    """Where runs begin, and what an undisturbed one leaves."""

    forks: Forks
    folder: Path
    whole: dict[str, Any]
    operations: int
    more: Mapping[str, Any] = MappingProxyType({})

    def settings(self, output: Path) -> list[str]:
        """Return the arguments of `mlx-simpo train`; those in ``more`` replace others."""
        settings = {
            "model": self.folder / "model",
            "data.train": self.folder / "pairs.jsonl",
            "output": output,
            "data.valid_fraction": 0.2,
            "lora.rank": 2,
            "lora.dropout": 0.2,
            "train.batch_size": 2,
            "train.gradient_accumulation_steps": 2,
            "train.learning_rate": 1e-2,
            "train.steps": 4,
            "train.eval_every": 2,
            "train.save_every": 1,
            "train.memory_check": "off",
            "train.resume": "auto",
            **self.more,
        }
        return [f"{name}={value}" for name, value in settings.items()]

    def train(self, output: Path, before: str = "", **fault: int) -> Ended:
        """Begin the run in this folder, or go on with it, in a process of its own."""
        return self.forks.run(f"{before}\ntrain(*{self.settings(output)!r})", output, **fault)

    def assert_ends_the_same(self, output: Path) -> None:
        """Go on with a run and compare it, bit for bit, with the undisturbed one."""
        ended = self.train(output)
        assert ended.status in (0, 3), ended.err
        assert differences(content(output), self.whole) == []


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kills]:
    yield from undisturbed(tmp_path_factory.mktemp("kills"), {})


@pytest.fixture(scope="module")
def mixed_kills(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kills]:
    """Three weighted sources and two validation sets; two epochs of five steps, and one more."""
    folder = tmp_path_factory.mktemp("mixed")
    weights = {"a": 1, "b": 2, "c": 1}
    train = [{"path": f"{folder}/{name}.jsonl", "weight": w} for name, w in weights.items()]
    valid = {"v": {"path": f"{folder}/v.jsonl"}, "w": {"path": f"{folder}/w.jsonl"}}
    more = {"data.train": json.dumps(train), "data.valid": json.dumps(valid)}
    yield from undisturbed(folder, {**more, "data.valid_main": "w", "train.steps": 11})


def undisturbed(folder: Path, more: Mapping[str, Any]) -> Iterator[Kills]:
    """Make the inputs and run to the end; yield what is compared with it."""
    tests = Path(__file__).parent
    environment = {"PYTHONPATH": f"{tests.parent}:{tests}", "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", INPUTS, str(folder)], env=environment, check=True)
    with Forks(SETUP) as forks:
        unmeasured = Kills(forks, folder, {}, 0, more)
        ended = unmeasured.train(folder / "whole")
        assert ended.status in (0, 3), ended.err
        operations = len(ended.operations)
        yield Kills(forks, folder, content(folder / "whole"), operations, more)


@pytest.mark.parametrize("part", range(1, PARTS + 1))
def test_a_run_that_is_killed_at_a_file_operation_ends_the_same(
    part: int, kills: Kills, tmp_path: Path
) -> None:
    # Odd steps, so that no kind of operation is always between two kills.
    number = kills.operations * part // PARTS - 7 * part
    ended = kills.train(tmp_path / "run", kill_at=number, torn=part % 2)
    assert ended.status == -9, ended.err
    kills.assert_ends_the_same(tmp_path / "run")


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_is_aborted_in_cpp_ends_the_same(
    step: int, kills: Kills, tmp_path: Path
) -> None:
    """As an exception of C++ that nobody catches ends the process."""
    ended = kills.train(tmp_path / "run", f"abort_in_step({step})")
    assert ended.status == -6, ended.err
    kills.assert_ends_the_same(tmp_path / "run")


@pytest.mark.parametrize("step", [3, 5, 9])
def test_a_run_on_a_mixture_that_is_killed_ends_the_same(
    step: int, mixed_kills: Kills, tmp_path: Path
) -> None:
    """Within an epoch, in its last step, and in the next one, which goes on with other pairs."""
    epochs = [sum_of_sources(mixed_kills.whole, first) for first in (0, 5)]
    assert epochs == [{"pairs/a": 5, "pairs/b": 10, "pairs/c": 5}] * 2
    ended = mixed_kills.train(tmp_path / "run", f"kill_in_step({step})")
    assert ended.status == -9, ended.err
    mixed_kills.assert_ends_the_same(tmp_path / "run")


def sum_of_sources(content: dict[str, Any], first: int) -> dict[str, int]:
    """The pairs of each source in the five steps after the first ones, as they are logged."""
    steps = [line for line in content["logs"]["metrics.jsonl"] if "learning_rate" in line]
    names = [name for name in steps[0] if name.startswith("pairs/")]
    return {name: sum(line[name] for line in steps[first : first + 5]) for name in names}


@pytest.mark.parametrize("part", [2, 4, 6])
def test_a_run_whose_disk_is_full_for_a_while_ends_the_same(
    part: int, kills: Kills, tmp_path: Path
) -> None:
    """The run goes on, or ends with an error; either way nothing of it is lost."""
    start = kills.operations * part // PARTS
    ended = kills.train(tmp_path / "run", full_at=start, full_until=start + 60)
    assert ended.status in (0, 2, 3), ended.err
    assert "Traceback" not in ended.err
    assert "No space left" in ended.err or "could not be written" in ended.err
    kills.assert_ends_the_same(tmp_path / "run")


def test_a_disk_that_stays_full_loses_nothing_that_was_saved(kills: Kills, tmp_path: Path) -> None:
    ended = kills.train(tmp_path / "run", full_at=kills.operations // 2)
    assert ended.status == 2
    assert "Traceback" not in ended.err
    assert "the last checkpoint is" in ended.err
    kills.assert_ends_the_same(tmp_path / "run")
