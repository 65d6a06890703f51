"""What is logged and shown of skipped steps, evaluations and responses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.commands import captured_display

from mlx_simpo.reporting.advice import COLLAPSE_REMEDY
from mlx_simpo.sampling.samples import Sample
from mlx_simpo.training.recording import evaluation_record, record_samples, record_skipped


class Recorder:
    """A run's folder and display, and what they were told."""

    def __init__(self) -> None:
        self.display, self._text = captured_display()
        self.display.console.width = 1000
        self.log: list[tuple] = []
        self.folder: Any = SimpleNamespace(
            path=Path("run"), log=lambda *record_and_name: self.log.append(record_and_name)
        )

    @property
    def lines(self) -> list[str]:
        return self._text.getvalue().splitlines()


def test_a_skipped_step_is_logged_with_all_that_is_known_and_warned_of() -> None:
    test, record = Recorder(), {"step": 7, "what": "gradient", "pairs": []}
    record_skipped(test.folder, test.display, record)
    assert test.log == [(record, "nonfinite.jsonl")]
    assert test.lines == [
        "warning: step 7 was skipped: its gradient is not a finite number; its pairs are in "
        "run/nonfinite.jsonl"
    ]


def test_the_metrics_of_a_set_have_its_name_if_it_has_one() -> None:
    results: Any = {
        name: SimpleNamespace(as_dict=lambda loss=loss: {"pairs": 3, "loss": loss})
        for name, loss in {"": 0.25, "chat": 0.5, "safety": 0.75}.items()
    }
    assert evaluation_record(results) == {
        "eval_pairs": 3,
        "eval_loss": 0.25,
        "eval/chat/pairs": 3,
        "eval/chat/loss": 0.5,
        "eval/safety/pairs": 3,
        "eval/safety/loss": 0.75,
    }


@pytest.mark.parametrize("is_new", [True, False])
def test_responses_are_logged_whole_and_shown_in_a_line_each(is_new: bool) -> None:
    """And warned of, if they have become worse than the first ones."""
    test, warning = Recorder(), []
    samples = [
        Sample("p" * 61, "r" * 201, 300, is_complete=False, repetition=0.9),
        Sample("two\nlines", "and\nthree\nmore", 5, is_complete=True, repetition=0.0),
        Sample("p" * 60, "r" * 200, 300, is_complete=False, repetition=0.9),
    ]
    record_samples(test.folder, test.display, 4, samples, samples[1:2] if is_new else samples)
    assert test.log == [({"step": 4, **sample.as_dict()}, "samples.jsonl") for sample in samples]
    if is_new:
        warning = [
            "warning: 2 of 3 sample responses repeat themselves up to the maximum length (before "
            f"training 0); the model is degenerating: {COLLAPSE_REMEDY}"
        ]
    assert test.lines == [
        f"step 4: {'p' * 59}… → {'r' * 199}…",
        "step 4: two lines → and three more",
        f"step 4: {'p' * 60} → {'r' * 200}",
        *warning,
    ]
