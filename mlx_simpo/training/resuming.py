"""What a checkpoint holds, and how a run continues from it.

adapters.safetensors, adapter_config.json, chat_template.jinja, config.yaml    an adapter folder
best/                 a copy of the run's best/, if there is one
state.safetensors     the optimizer, the random state, and the evaluations' log-probabilities
progress.json         `Progress`, the run's fingerprint and its engine's figures
"""

import json
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..config.simpo_config import SimPOConfig
from ..device import processor
from ..engine.figures import Figures, default_figures
from ..errors import SimPOError
from ..evaluation import Evaluation, summarize_logps
from ..files import load_safetensors, read_json, save_safetensors
from ..model.adapters import SCRATCH, load_weights
from ..reporting.display import Display
from ..runs.checkpoints import newest_valid
from ..runs.folder import RunFolder
from .fingerprint import changed_settings, check_same_run
from .session import Session

STATE, PROGRESS = "state.safetensors", "progress.json"


@dataclass
class Progress:
    """How far a run is, as plain values for JSON.

    step: finished steps. skipped: those without an update. evaluated: the step of the last
    evaluation, -1 before the first. best: loss and step of the best one. last: the metrics of the
    last step, as in metrics.jsonl. early_stopping, watch: the states of these two, if the run has
    begun. samples: the first responses to train.sample_prompts. logs: see
    `RunFolder.log_positions`. seconds: of training so far. save_cost: seconds that the
    checkpoint before took.
    """

    step: int = 0
    skipped: int = 0
    evaluated: int = -1
    best: tuple[float, int] | None = None
    last: dict[str, Any] | None = None
    early_stopping: dict[str, Any] = field(default_factory=dict)
    watch: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    logs: dict[str, list[Any]] = field(default_factory=dict)
    seconds: float = 0.0
    save_cost: float = 0.0


@dataclass
class Evaluations:
    """The evaluations before the first step, and the latest ones, by the names of the sets."""

    before: dict[str, Evaluation] = field(default_factory=dict)
    latest: dict[str, Evaluation] = field(default_factory=dict)


def write_checkpoint(
    folder: Path,
    session: Session,
    run: RunFolder,
    progress: Progress,
    evaluations: Evaluations,
    fingerprint: dict[str, Any],
) -> None:
    """Write the files of a checkpoint into an empty folder.

    Raises:
        OSError, SimPOError: they cannot be written.
    """
    session.save(folder)
    best = run.path / "best"
    if progress.best is not None and best.is_dir():  # somebody may have moved it away
        copy_files(best, folder / "best")
    arrays = session.state.arrays()
    for when, results in vars(evaluations).items():
        for name, evaluation in results.items():
            key = _evaluation_key(when, name)
            arrays[f"{key}.chosen"] = mx.array(evaluation.chosen_logps)
            arrays[f"{key}.rejected"] = mx.array(evaluation.rejected_logps)
    save_safetensors(folder / STATE, arrays, "mlx")
    progress.step, progress.skipped = session.state.step, session.state.skipped
    progress.logs = run.log_positions()
    figures = session.engine.figures
    content = {
        "fingerprint": fingerprint,
        "figures": None if figures is None else figures.as_dict(),
        **asdict(progress),
    }
    (folder / PROGRESS).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def newest_checkpoint(run: RunFolder, display: Display) -> Path | None:
    """Return the checkpoint to go on from, with a warning for each newer one that is damaged.

    None if the run ended before its first one: it begins again at its first step.

    Raises:
        SimPOError: there are checkpoints, and all of them are damaged.
    """
    path, damaged = newest_valid(run.checkpoints)
    if path is None and damaged:
        raise SimPOError(
            f"no checkpoint of the run is whole ({'; '.join(damaged)}); begin a new run in another "
            f"output folder, or remove {run.path} to begin again"
        )
    for message in damaged:
        display.warn(message)
    if path is None:
        display.note("the run has no checkpoint yet; it begins at its first step")
    return path


def recorded_figures(path: Path, config: SimPOConfig) -> Figures | None:
    """Return the engine's figures that the run of a checkpoint goes on with.

    Others would divide its steps into other micro-batches, which rounds differently.

    Returns:
        None if they are to be chosen anew, because the settings of the engine or the processor
        changed, or the run's engine had none. Of a run of an older version: those built in.

    Raises:
        SimPOError: the checkpoint has none of the expected form.
    """
    content = read_json(path / PROGRESS)
    try:
        saved = content["fingerprint"]
        changed = changed_settings(saved["config"], config.as_dict(), "rounding")
        if any(name.startswith("engine.") for name in changed):
            return None
        if "figures" not in content:
            return default_figures()
        if saved["versions"]["the processor"] != processor():
            return None
        values = content["figures"]
        return None if values is None else Figures.from_dict(values, "recorded by the run")
    except (KeyError, TypeError, AttributeError, SimPOError) as error:
        raise _not_as_written(path, error) from None


def restore_checkpoint(
    session: Session, run: RunFolder, path: Path, fingerprint: dict[str, Any]
) -> tuple[Progress, Evaluations]:
    """Set a session and its folder to a checkpoint that is whole.

    Raises:
        SimPOError: the run must not go on with this configuration, data or model, or its folder
            cannot be written.
    """
    content = read_json(path / PROGRESS)
    try:
        saved = content.pop("fingerprint")
        progress = Progress(**{f.name: content[f.name] for f in fields(Progress)})
        messages = check_same_run(saved, fingerprint)
        step, total = int(progress.step), session.total_steps
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_as_written(path, error) from None
    if step > total:
        raise SimPOError(
            f"the run has done {step} steps, and with these settings it has {total}; set "
            f"train.steps to {step} or more, or train.epochs accordingly"
        )
    load_weights(session.model, path)
    arrays = load_safetensors([path / STATE])
    session.state.restore(arrays, step, progress.skipped)
    # MLX reads a file's arrays when they are used, and by then this checkpoint may be deleted.
    mx.eval(session.model.trainable_parameters(), session.state.optimizer.state)
    for message in [*messages, *run.rewind_logs(progress.logs)]:
        session.display.warn(message)
    _restore_best(path / "best", run.path / "best")
    evaluations = Evaluations(
        *(_evaluations(arrays, item.name, session) for item in fields(Evaluations))
    )
    session.display.note(f"resuming after step {step} of {total}, from {path}")
    return progress, evaluations


def _not_as_written(path: Path, error: Exception) -> SimPOError:
    return SimPOError(
        f"{path / PROGRESS} is not as a run writes it ({error!r}); remove {path} to go on from the "
        "checkpoint before"
    )


def remove_remains(run: RunFolder) -> None:
    """Delete what a process has left behind that was killed while it wrote the adapter."""
    for path in run.path.glob(f"{SCRATCH}*"):
        shutil.rmtree(path, ignore_errors=True)


def copy_files(source: Path, target: Path) -> None:
    """Copy the files of a folder, without its subfolders, into a new one.

    No hard links: whoever edited a file of best/ would edit those of the checkpoints.

    Raises:
        OSError: it cannot be read or written.
    """
    target.mkdir()
    for file in source.iterdir():
        if file.is_file():
            shutil.copyfile(file, target / file.name)


def _restore_best(saved: Path, best: Path) -> None:
    """Replace best/ by that of a checkpoint, or remove it if the checkpoint has none.

    Raises:
        SimPOError: it cannot be written.
    """
    try:
        if best.is_dir() and not best.is_symlink():
            shutil.rmtree(best)
        if saved.is_dir():
            copy_files(saved, best)
    except OSError as error:
        raise SimPOError(
            f"cannot restore {best}: {error}; make it a folder that can be written, with space for "
            "an adapter"
        ) from None


def _evaluation_key(when: str, name: str) -> str:
    """Return the beginning of the names of a set's log-probabilities in a checkpoint."""
    return f"{when}/{name}" if name else when


def _evaluations(arrays: dict[str, mx.array], when: str, session: Session) -> dict[str, Evaluation]:
    """Return the evaluations of all sets that were saved for one of the fields of `Evaluations`."""
    results = {}
    for name, pairs in session.valid_sets.items():
        key = _evaluation_key(when, name)
        if f"{key}.chosen" in arrays:
            chosen, rejected = (np.array(arrays[f"{key}.{n}"]) for n in ("chosen", "rejected"))
            results[name] = summarize_logps(pairs, chosen, rejected, session.config.objective)
    return results
