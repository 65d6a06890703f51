"""The terminal: notes, warnings, progress bars and tables, all on stderr."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..errors import redacted, visible
from ..evaluation import Evaluation

# The metrics in an evaluation's table, in reading order.
EVALUATION_ROWS = (
    "loss",
    "sft_loss",
    "rewards/accuracies",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "chosen_tokens",
    "rejected_tokens",
)
SECONDS_BETWEEN_LINES = 5.0


class _Stderr(Console):
    """Standard error; if its reader has gone (``2>&1 | less``), nothing more is shown."""

    def __init__(self) -> None:
        super().__init__(stderr=True, highlight=False)

    def on_broken_pipe(self) -> None:
        self.quiet = True  # rich would end the process


class Display:
    """Writes to ``console``; default: stderr, so that stdout has nothing but results.

    ``Display(Console(quiet=True))`` shows nothing. A text that cannot be written, into a log on a
    full disk, does not end what it is about: it is shown with the next one.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _Stderr()
        self._live: Progress | None = None

    def note(self, text: str | None) -> None:
        """Write one line; nothing for None (see `advice`)."""
        if text is not None:
            # Without soft_wrap, rich breaks long lines, which then cannot be searched for.
            self._print(literal(text), soft_wrap=True)

    def warn(self, text: str | None) -> None:
        """Write one line that begins with ``warning:``; nothing for None (see `advice`)."""
        if text is not None:
            line = Text.assemble(("warning:", "yellow"), " ", literal(text))
            self._print(line, soft_wrap=True)

    @contextmanager
    def progress(self, title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
        """Show a progress bar that begins at ``done``; the context's value is a function to advance
        it, with the number of steps just done (default 1) and a note.

        A nested bar is shown below the outer one and removed when it is done. If stderr is not a
        terminal (a log file), a line is written every few seconds instead.
        """
        if not self.console.is_terminal:
            yield from self._log_lines(title, total, done)
            return
        if self._live is not None:
            yield from self._bar(self._live, title, total, done, keep=False)
            return
        columns = (
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self.console) as self._live:
            try:
                yield from self._bar(self._live, title, total, done, keep=True)
            finally:
                self._live = None

    def _log_lines(self, title: str, total: int, done: int) -> Iterator[Callable[..., None]]:
        written = time.monotonic()

        def advance(more: int = 1, note: str = "") -> None:
            nonlocal done, written
            done += more
            if time.monotonic() - written >= SECONDS_BETWEEN_LINES:
                self.note(f"{title} {done}/{total}" + (f": {note}" if note else ""))
                written = time.monotonic()

        yield advance

    def _bar(
        self, live: Progress, title: str, total: int, done: int, *, keep: bool
    ) -> Iterator[Callable[..., None]]:
        task = live.add_task(title, total=total, completed=done, note="")

        def advance(done: int = 1, note: str = "") -> None:
            live.update(task, advance=done)
            if note:
                live.update(task, note=note)

        yield advance
        if not keep:
            live.remove_task(task)

    def evaluations(self, columns: Mapping[str, Evaluation], name: str = "") -> None:
        """Show evaluations of the same pairs side by side, under the name of their set."""
        self._print(evaluation_table(columns, name))

    def _print(self, content: Any, **options: Any) -> None:
        with suppress(OSError):
            self.console.print(content, **options)


def literal(text: str) -> Text:
    """Return text that rich prints as it is: without markup and emoji names, with escapes for
    control characters and what is not valid Unicode, and without tokens and passwords."""
    return Text(visible(redacted(text)))


def evaluation_table(columns: Mapping[str, Evaluation], name: str = "") -> Table:
    """Return a table of evaluations of the same pairs, one column per evaluation.

    Args:
        name: of the validation set, for the title.
    """
    pairs = count_text(len(next(iter(columns.values())).pairs), "pair")
    table = Table(title=f"{name}: {pairs}" if name else pairs, title_justify="left")
    table.add_column("metric")
    for name in columns:
        table.add_column(name, justify="right")
    evaluations = list(columns.values())
    for row in EVALUATION_ROWS:
        if row in evaluations[0].metrics:
            table.add_row(row, *(metric_text(row, e.metrics[row]) for e in evaluations))
        if row == "rewards/accuracies":
            intervals = (e.accuracy_interval for e in evaluations)
            cells = (f"{low:.1%} to {high:.1%}" for low, high in intervals)
            table.add_row("  95 % interval", *cells)
    return table


def count_text(number: int, noun: str) -> str:
    """Return a number with its noun: "1 pair", "1,200 pairs"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def metric_text(name: str, value: float) -> str:
    """Format a metric's value with as many digits as are worth reading."""
    if name == "rewards/accuracies":
        return f"{value:.1%}"
    return f"{value:.1f}" if name.endswith("_tokens") else f"{value:.4f}"


def step_note(metrics: Mapping[str, Any]) -> str:
    """Format the metrics that are shown beside the training bar."""
    if "loss" not in metrics:
        return "skipped: not finite"
    return (
        f"loss {metrics['loss']:.3f}  accuracy {metrics['rewards/accuracies']:.0%}  "
        f"margin {metrics['rewards/margins']:+.2f}"
    )
