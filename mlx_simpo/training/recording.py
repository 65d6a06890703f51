"""What happens in a run, written to its folder and shown."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import one_line
from ..evaluation import Evaluation
from ..reporting.display import Display
from ..runs.folder import NONFINITE, SAMPLES, RunFolder
from ..sampling.samples import Sample, sample_warning

SHOWN_CHARACTERS = 200  # of a response to train.sample_prompts


def record_skipped(folder: RunFolder, display: Display, record: dict[str, Any]) -> None:
    """Log what is known of a skipped step (`step.NonFiniteError.record`), and warn."""
    folder.log(record, NONFINITE)
    display.warn(
        f"step {record['step']} was skipped: its {record['what']} is not a finite number; its "
        f"pairs are in {folder.path / NONFINITE}"
    )


def evaluation_record(results: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return evaluations as metrics.jsonl has them: eval_loss …, of a named set eval/NAME/loss …"""
    prefixes = {name: f"eval/{name}/" if name else "eval_" for name in results}
    return {
        f"{prefixes[name]}{metric}": value
        for name, result in results.items()
        for metric, value in result.as_dict().items()
    }


def record_samples(
    folder: RunFolder,
    display: Display,
    step: int,
    samples: Sequence[Sample],
    first: Sequence[Sample],
) -> None:
    """Log and show responses to train.sample_prompts, and compare them with the first ones."""
    for sample in samples:
        folder.log({"step": step, **sample.as_dict()}, SAMPLES)
        response = one_line(sample.response, SHOWN_CHARACTERS)
        display.note(f"step {step}: {one_line(sample.prompt, 60)} → {response}")
    display.warn(sample_warning(first, samples))
