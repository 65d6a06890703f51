"""What commands print on standard output: tables for people, JSON for programs."""

import argparse
import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from ..errors import SimPOError


def counts_table(summary: dict[str, Any]) -> Table:
    """How many records are used, cut and quarantined."""
    table = Table(show_header=False, title="what will be trained on", title_justify="left")
    table.add_column(justify="right")
    table.add_column()
    table.add_row(str(summary["records"]), "records")
    table.add_row(str(summary["pairs"]), "pairs")
    for reason, count in summary["quarantined"].items():
        first = next(q for q in summary["quarantined_records"] if q["reason"] == reason)
        table.add_row(str(count), f"quarantined: {reason}, e.g. {first['source']}")
    table.add_row(str(summary["prompts_cut"]), "prompts cut on the left")
    table.add_row(str(summary["responses_cut"]), "pairs with a response cut on the right")
    table.add_row(str(summary["tokens_cut"]), "tokens cut in all")
    table.add_row(
        str(summary["boundary_merges"]),
        "pairs in which a token spans prompt and response",
    )
    table.add_row(f"{summary['scored_tokens']:,}", f"scored tokens of {summary['tokens']:,}")
    return table


def lengths_table(summary: dict[str, Any]) -> Table:
    """Quantiles of prompt and response lengths, in tokens."""
    table = Table(title="tokens", title_justify="left")
    table.add_column("")
    rows = summary["lengths"]
    for label in next(iter(rows.values())):
        table.add_column(label, justify="right")
    for name, values in rows.items():
        table.add_row(name, *(str(v) for v in values.values()))
    return table


def plain_console() -> Console:
    """Standard output; what looks like markup or an emoji's name is neither."""
    return Console(highlight=False, markup=False, emoji=False)


def print_json(value: Any) -> None:
    """JSON to stdout, for other programs; what is no text (half an emoji) as \\u escapes."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode())


def refuse_settings(options: argparse.Namespace, command: str) -> None:
    """SimPOError if a command that takes no settings was given some, or a file of them."""
    if options.config or options.settings:
        extra = options.config or options.settings[0]
        raise SimPOError(f"{command} takes no settings; leave out {extra!r}")
