"""``mlx-simpo data``: look at data before training, and write it as clean JSON Lines."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from shlex import quote
from typing import TYPE_CHECKING, Any

from ..config.simpo_config import load_config
from ..config.sources import SourceConfig
from ..errors import SimPOError
from ..paths import local_path
from . import inspect
from .arguments import add_argument, add_command_with_settings
from .interrupt import exit_on_interrupt
from .output import announce, escaped, print_json

if TYPE_CHECKING:
    from ..data.export import Export

STDOUT = "-"
_OTHER_FORMATS = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".gz", ".zst")


def add(commands: Any) -> None:
    """Add the command with its actions."""
    about = "Look at data, or write it as clean JSON Lines."
    data = commands.add_parser("data", help="look at data, convert it", description=about)
    actions = data.add_subparsers(metavar="ACTION", required=True)
    inspect.add(actions)
    summary = "write any accepted data as clean JSON Lines: prompt, chosen, rejected"
    parser = add_command_with_settings(actions, "convert", run_convert, summary, "SOURCE")
    about = "file, folder or Hub dataset of pairs, or - for stdin"
    add_argument(parser, "source", "SOURCE", about, "--data")
    parser.add_argument("--split", help="split of a folder or dataset")
    parser.add_argument("--subset", help="configuration of a Hub dataset")
    parser.without_effect |= dict.fromkeys(
        ("data.train", "data.folder", "data.valid"), "what to convert is named by SOURCE"
    )
    parser.without_effect |= dict.fromkeys(
        ("data.train_split", "data.valid_split"), "the split is named by --split"
    )
    parser.without_effect["data.max_samples"] = "all records are converted"
    parser.add_argument(
        "--output", default=STDOUT, metavar="FILE", help="new file; default: -, standard output"
    )


def run_convert(options: argparse.Namespace) -> None:
    """Write the pairs, and to stderr how many there are and what is quarantined.

    Raises:
        SimPOError: the data cannot be read or has no valid pair, or the file exists or cannot be
            written.
    """
    _check_ending(options.output)
    if options.json and options.output == STDOUT:
        raise SimPOError("--json prints to standard output, where the pairs go; add --output FILE")
    # No model is needed, but a configuration names one.
    model = [] if options.config else ["model=none"]
    settings = load_config(options.config, [*model, *options.settings]).data
    subset = options.subset or settings.subset
    announce(f"reading {options.source}")
    with exit_on_interrupt():
        from ..data.export import export_pairs
        from ..data.pairs import check_share
        from ..data.sources import open_source

    source = open_source(
        SourceConfig(options.source, split=options.split, subset=subset, columns=settings.columns)
    )
    if source.note:
        sys.stderr.write(f"{escaped(source.note)}\n")
    with _open_output(options.output) as write:
        result = export_pairs(
            source, write, implicit_string_prompts=settings.implicit_string_prompts
        )
        check_share(result.num_pairs, result.quarantined, 1.0, source.name)
    _print_result(options, result)


def _check_ending(output: str) -> None:
    """Refuse a file name that promises another format, as which the file would be read again.

    Raises:
        SimPOError: it ends like a table or a compressed file.
    """
    name = output.lower()
    ending = next((ending for ending in _OTHER_FORMATS if name.endswith(ending)), None)
    if ending is not None:
        plain = output[: -len(ending)].removesuffix(".jsonl")
        raise SimPOError(
            f"--output is {output}, but JSON Lines are written, and not compressed; write "
            f"--output {quote(plain + '.jsonl')}"
        )


@contextmanager
def _open_output(output: str) -> Iterator[Callable[[bytes], Any]]:
    """Open standard output or a new file to write to; the file is deleted if anything fails.

    Raises:
        SimPOError: the file exists or cannot be written.
    """
    if output == STDOUT:
        yield sys.stdout.buffer.write
        sys.stdout.flush()
        return
    path = local_path(output)
    try:
        with path.open("xb") as file:
            try:
                yield file.write
            except BaseException:
                path.unlink(missing_ok=True)
                raise
    except FileExistsError:
        raise SimPOError(f"{output} exists already; name another file, or delete it") from None
    except OSError as error:
        raise SimPOError(f"cannot write {output}: {error}") from None


def _print_result(options: argparse.Namespace, result: "Export") -> None:
    from ..data.pairs import count_reasons
    from ..reporting.display import count_text

    reasons = count_reasons(result.quarantined)
    if options.json:
        print_json({"output": options.output, "pairs": result.num_pairs, "quarantined": reasons})
    where = "standard output" if options.output == STDOUT else options.output
    lines = [f"{count_text(result.num_pairs, 'pair')} written to {where}"]
    for reason, count in reasons.items():
        first = next(q for q in result.quarantined if q.reason == reason)
        lines.append(f"{count} quarantined: {reason}, e.g. {first.location}")
    sys.stderr.write("".join(f"{escaped(line)}\n" for line in lines))
