"""A run's folder: the adapter, and the record of how it was trained.

config.yaml           the whole configuration, defaults included
metrics.jsonl         one line per training step and per evaluation
quarantined.jsonl     records that were not used, and why (if any)
adapters.safetensors, adapter_config.json      the trained adapter, in mlx-lm's format
chat_template.jinja   the template it was trained with (if any)
best/                 the adapter with the lowest evaluation loss (with train.eval_every)
summary.json          the result of the run, see `api.TrainResult`
"""

import json
import shutil
from collections.abc import Iterable
from typing import Any

from ..errors import SimPOError
from ..files import write_text
from ..paths import local_path


def check_output_free(output: str) -> None:
    """Check that the output folder does not exist or is empty, before any work is done.

    Raises:
        SimPOError: it is not empty, or is a file.
    """
    path = local_path(output)
    if path.is_file():
        raise SimPOError(f"output is {output!r}, which is a file; it must be a new folder")
    if path.is_dir() and any(path.iterdir()):
        what = "holds a run already" if (path / "config.yaml").exists() else "is not empty"
        raise SimPOError(f"output is {output!r}, which {what}; name a new folder, or remove it")


class RunFolder:
    """The record of one run on disk, begun when the run's input is known to be valid.

    path: the folder. steps: the last step that was logged, 0 before the first.
    """

    def __init__(
        self, output: str, config_yaml: str, quarantined: Iterable[dict[str, Any]]
    ) -> None:
        """Create the folder with the configuration and the quarantined records (as JSON objects).

        Raises:
            SimPOError: it cannot be written.
        """
        self.path = local_path(output)
        self.steps = 0
        lines = [json.dumps(q, ensure_ascii=False) + "\n" for q in quarantined]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.yaml", config_yaml)
            if lines:
                write_text(self.path / "quarantined.jsonl", "".join(lines))
        except OSError as error:
            raise SimPOError(f"output is {output!r}; it cannot be written: {error}") from None
        except SimPOError:  # of write_text: the folder itself was created
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; ``record`` has the step's number as "step"."""
        self.steps = max(self.steps, record["step"])
        # Opened again for each line: after a crash, the file has every finished step.
        write_text(self.path / "metrics.jsonl", json.dumps(record) + "\n", append=True)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        write_text(self.path / "summary.json", text)

    def discard_if_empty(self) -> None:
        """Delete the folder if no step was finished, so that nothing half-written stays."""
        if not self.steps:
            shutil.rmtree(self.path)
