"""How responses are printed: as they are generated, under headings or in columns, or as JSON."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from typing import TYPE_CHECKING, Any

from ..errors import visible
from .output import plain_console, print_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from ..sampling.generate import Response
    from ..sampling.responder import ResponsePart

# Columns of a terminal from which on two responses beside each other are easy to read.
WIDE = 100
_FRAME_SECONDS = 0.1
# Of a table with columns: the lines around its cells, and the characters between them.
_FRAME_LINES, _FRAME_CHARACTERS = 5, 7


def fits_side_by_side() -> bool:
    """Whether stdout is a terminal in which two responses fit beside each other."""
    return sys.stdout.isatty() and plain_console().width >= WIDE


def stream_text(
    parts: "Iterator[ResponsePart]", prompts: Sequence[str], sources: Sequence[str]
) -> "list[Response]":
    """Print responses one below the other while they are generated, and return them.

    One response is printed alone, several under headings; where stdout is not a terminal, a heading
    is a word before the text.

    Args:
        parts: of the responses to each prompt, in the order of ``sources``. prompts: their texts.
    """
    responses: list[Response] = []
    is_first = True
    for part in _without_stray_output(parts):
        if is_first:
            number = part.prompt if part.source == sources[0] and len(prompts) > 1 else None
            _print_heading(prompts, number, part.source if len(sources) > 1 else "")
        print_text(part.text)
        sys.stdout.flush()
        is_first = part.response is not None
        if part.response is not None:
            print_text("\n")
            responses.append(part.response)
    return responses


def _print_heading(prompts: Sequence[str], number: int | None, source: str) -> None:
    """Print the heading of a response: its prompt, if there is a ``number``, and its source."""
    if number:
        print_text("\n")
    if not sys.stdout.isatty():
        prompt = "" if number is None else f"prompt: {prompts[number]}\n"
        label = source or ("" if number is None else "response")
        print_text(prompt + (f"{label}: " if label else ""))
        return
    console = plain_console()
    if number is not None:
        title = _title(console, prompts, number)
        console.rule(title, align="left", characters="━", style="bold")
    if source:
        console.rule(source, align="left", characters="─", style="dim")


def _title(console: "Console", prompts: Sequence[str], number: int) -> "Text":
    """Return a prompt on one line, with its number if there are several."""
    from rich.text import Text

    prompt = " ".join(prompts[number].split())
    counted = prompt if len(prompts) == 1 else f"{number + 1} of {len(prompts)}: {prompt}"
    title = Text(visible(counted), "bold")
    title.truncate(max(1, console.width - 4), overflow="ellipsis")
    return title


def stream_columns(
    parts: "Iterator[ResponsePart]", prompts: Sequence[str], sources: Sequence[str]
) -> "list[Response]":
    """Print the responses to each prompt beside each other while they are generated.

    Arguments and result are those of `stream_text`.
    """
    from rich.live import Live

    console = plain_console()
    responses: list[Response] = []
    parts = _without_stray_output(parts)
    for number in range(len(prompts)):
        title = _title(console, prompts, number)
        texts = dict.fromkeys(sources, "")
        count, shown = 0, 0.0
        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
            while count < len(sources):
                part = next(parts)
                texts[part.source] += part.text
                if part.response is not None:
                    count += 1
                    responses.append(part.response)
                if time.monotonic() - shown >= _FRAME_SECONDS:
                    live.update(_columns(console, title, texts, console.height), refresh=True)
                    shown = time.monotonic()
            live.update(_columns(console, title, texts), refresh=True)
    return responses


def _columns(
    console: "Console", title: "Text", texts: dict[str, str], height: int | None = None
) -> "Table":
    """Return texts beside each other; with a ``height`` only as many of their last lines as fit."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", expand=True)
    cells = []
    width = (console.width - _FRAME_CHARACTERS) // len(texts)
    for name, text in texts.items():
        table.add_column(name, ratio=1)
        cell = Text(visible(text))
        if height is not None:
            rows = cell.wrap(console, width)
            cell = Text("\n").join(rows[-max(1, height - _FRAME_LINES - 1) :])
        cells.append(cell)
    table.add_row(*cells)
    return table


def wait_for_responses(
    parts: "Iterator[ResponsePart]", prompts: Sequence[str], sources: Sequence[str]
) -> "list[Response]":
    """Print nothing to stdout, and show on stderr how many responses there are.

    Arguments and result are those of `stream_text`.
    """
    from ..reporting.display import Display

    responses: list[Response] = []
    with Display().progress("Generating", len(prompts) * len(sources)) as advance:
        for part in _without_stray_output(parts):
            if part.response is not None:
                responses.append(part.response)
                advance()
    return responses


def response_records(
    prompts: Sequence[Any], sources: Sequence[str], responses: "Sequence[Response]"
) -> list[dict[str, Any]]:
    """Return each prompt with its seed and the responses to it, as JSON values."""
    records = []
    for number, prompt in enumerate(prompts):
        own = responses[number * len(sources) : (number + 1) * len(sources)]
        by_source = {s: r.as_dict() for s, r in zip(sources, own, strict=True)}
        records.append({"prompt": prompt, "seed": own[0].seed, **by_source})
    return records


def cut_note(finish_reasons: Sequence[str], max_tokens: int) -> str | None:
    """Say how many responses were cut at the maximum length; None if none was."""
    cut = finish_reasons.count("length")
    if not cut:
        return None
    total, were = len(finish_reasons), "was" if cut == 1 else "were"
    which = "the response" if total == 1 else f"{cut} of {total} responses"
    return f"{which} {were} cut at {max_tokens} tokens; for more, add --max-tokens {2 * max_tokens}"


def _without_stray_output(parts: "Iterator[ResponsePart]") -> "Iterator[ResponsePart]":
    """Yield the parts; what is printed while they are generated goes to stderr.

    mlx-lm prints a warning if the model hardly fits into the memory of a Mac.
    """
    while True:
        with redirect_stdout(sys.stderr):
            part = next(parts, None)
        if part is None:
            return
        yield part
