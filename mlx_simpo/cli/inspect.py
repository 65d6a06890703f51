"""``mlx-simpo data inspect``."""

import argparse
from typing import TYPE_CHECKING, Any

from ..config.simpo_config import load_config
from ..errors import SimPOError
from .arguments import add_command_with_settings
from .interrupt import exit_on_interrupt
from .output import announce, plain_console, print_json

if TYPE_CHECKING:
    from rich.table import Table


def add(actions: Any) -> None:
    """Add the action to the command ``data``."""
    summary = "show what would be trained on, and how it is tokenized"
    parser = add_command_with_settings(actions, "inspect", run, summary, "DATA")
    parser.add_argument("data", help="file, folder or Hub dataset of pairs")
    parser.add_argument("--model", help="Hub id or folder of the model whose tokenizer is used")
    parser.add_argument("--split", help="split of a folder or Hub dataset")
    parser.add_argument(
        "--pair", type=int, default=0, metavar="N", help="number of the pair to show; default: 0"
    )


def run(options: argparse.Namespace) -> None:
    """Print counts, lengths and one pair in tokens; with --json the counts and lengths.

    Raises:
        SimPOError: there is no pair of that number, or the data cannot be read.
    """
    model = [f"model={options.model}"] if options.model else []
    config = load_config(options.config, [*model, *options.settings])
    announce(f"reading {options.data} with the tokenizer of {config.model}")
    with exit_on_interrupt():
        from rich.text import Text

        from ..api import inspect
        from ..data.inspection import marked

    result = inspect(config, options.data, options.split)
    if not 0 <= options.pair < len(result.pairs):
        raise SimPOError(f"--pair is {options.pair}; it must be 0 to {len(result.pairs) - 1}")
    if options.json:
        print_json(result.summary)
        return
    pair = result.pairs[options.pair]
    console = plain_console()
    console.print(_counts_table(result.summary))
    console.print(_lengths_table(result.summary))
    for name, style in (("chosen", "green"), ("rejected", "red")):
        sequence = getattr(pair, name)
        title = f" of {pair.source}: {sequence.num_scored} scored tokens, between ⟦ and ⟧"
        console.print(Text.assemble("\n", (name, "bold"), title))
        console.print(marked(sequence, result.encoder.tokenizer, style))


def _counts_table(summary: dict[str, Any]) -> "Table":
    """Return the table of how many pairs are used, truncated and quarantined."""
    from rich.table import Table

    table = Table(show_header=False, title="what will be trained on", title_justify="left")
    table.add_column(justify="right")
    table.add_column()
    table.add_row(str(summary["records"]), "records")
    table.add_row(str(summary["pairs"]), "pairs")
    for reason, count in summary["quarantined"].items():
        first = next(q for q in summary["quarantined_records"] if q["reason"] == reason)
        table.add_row(str(count), f"quarantined: {reason}, e.g. {first['source']}")
    table.add_row(str(summary["prompts_cut"]), "prompts truncated on the left")
    table.add_row(str(summary["responses_cut"]), "pairs with a response truncated on the right")
    table.add_row(str(summary["tokens_cut"]), "tokens truncated in all")
    table.add_row(
        str(summary["boundary_merges"]), "pairs with a token that spans prompt and response"
    )
    table.add_row(f"{summary['scored_tokens']:,}", f"scored tokens of {summary['tokens']:,}")
    return table


def _lengths_table(summary: dict[str, Any]) -> "Table":
    """Return the table of quantiles of prompt and response lengths, in tokens."""
    from rich.table import Table

    table = Table(title="tokens", title_justify="left")
    table.add_column("")
    lengths = summary["lengths"]
    for label in next(iter(lengths.values())):
        table.add_column(label, justify="right")
    for name, values in lengths.items():
        table.add_row(name, *(str(v) for v in values.values()))
    return table
