"""A run's folder: the adapter, and the record of how it came about.

config.yaml           the resolved configuration
metrics.jsonl         a line a training step or evaluation
quarantined.jsonl     records that were left out, and why (if any)
adapters.safetensors, adapter_config.json      the trained adapter, in mlx-lm's format
chat_template.jinja   the template it was trained with (if any)
best/                 the adapter with the lowest evaluation loss (with train.eval_every)
summary.json          what the run came to
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import SimPOError
from ..files import write_text
from ..paths import local_path


def check_output_free(output: str) -> None:
    """Refuse an output folder that holds something already, before any work is done.

    Raises:
        SimPOError: the folder exists and is not empty, or is a file.
    """
    path = local_path(output)
    if path.is_file():
        raise SimPOError(f"output is {output!r}, which is a file; it must be a new folder")
    if path.is_dir() and any(path.iterdir()):
        what = "holds a run already" if (path / "config.yaml").exists() else "is not empty"
        raise SimPOError(f"output is {output!r}, which {what}; name a new folder, or remove it")


class RunFolder:
    """The record of one run; made when the run is known to be sound."""

    def __init__(self, output: str, config_yaml: str, quarantined: Iterable[dict[str, Any]]) -> None:
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
        except SimPOError:
            shutil.rmtree(self.path, ignore_errors=True)
            raise

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        self.steps = max(self.steps, record["step"])
        write_text(self.path / "metrics.jsonl", json.dumps(record) + "\n", append=True)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write summary.json."""
        text = json.dumps(summary, indent=2, ensure_ascii=False) + "\n"
        write_text(self.path / "summary.json", text)

    def discard_if_empty(self) -> None:
        """Take the folder away again if no step was finished: nothing half-written stays."""
        if not self.steps:
            shutil.rmtree(self.path)


