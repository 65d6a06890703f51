"""``mlx-simpo data inspect``."""

import argparse
from typing import TYPE_CHECKING, Any

from ..config.simpo_config import load_config
from ..errors import SimPOError, visible
from ..paths import local_path
from .arguments import add_argument, add_command_with_settings
from .interrupt import exit_on_interrupt
from .output import announce, plain_console, print_json, print_note, print_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..api import Inspection


def add(actions: Any) -> None:
    """Add the action to the command ``data``."""
    summary = "show what would be trained on, and how it is tokenized"
    parser = add_command_with_settings(actions, "inspect", run, summary, "[DATA ...]")
    add_argument(
        parser,
        "data",
        "DATA",
        "files, folders or Hub datasets of pairs; default: all that CONFIG.yaml and the settings "
        "name",
        "--data",
        nargs="*",
    )
    parser.sets["model"] = "model"
    parser.add_argument("--model", help="Hub id or folder of the model whose tokenizer is used")
    parser.add_argument("--split", help="split of folders and Hub datasets")
    parser.add_argument(
        "--pair", type=int, default=0, metavar="N", help="number of the pair to show; default: 0"
    )
    parser.add_argument(
        "--quarantined", action="store_true", help="list all quarantined records, nothing else"
    )
    parser.add_argument(
        "--html", metavar="FILE", help="also write a page with all this and the pairs to FILE"
    )
    parser.add_argument(
        "--html-pairs", type=int, metavar="N", help="number of pairs on the page; default: 500"
    )


def run(options: argparse.Namespace) -> None:
    """Print counts, lengths, what stands out, and one pair in tokens; with --json all but the pair.

    Raises:
        SimPOError: there is no pair of that number, the data cannot be read, or the page cannot be
            written.
    """
    model = [f"model={options.model}"] if options.model else []
    config, data = load_config(options.config, [*model, *options.settings]), options.data
    _check_page(options)
    what = ", ".join(data) or "the configuration's data"
    announce(f"reading {what} with the tokenizer of {config.model}")
    with exit_on_interrupt():
        from ..api import inspect
        from ..files import write_text
        from ..reporting.inspection_page import MAX_PAIRS, inspection_page

    result = inspect(config, data or None, options.split)
    if not 0 <= options.pair < len(result.pairs):
        raise SimPOError(f"--pair is {options.pair}; it must be 0 to {len(result.pairs) - 1}")
    if options.html:
        page = inspection_page(
            result.overview,
            result.summary,
            result.encoder,
            config.model,
            options.html_pairs or MAX_PAIRS,
        )
        write_text(local_path(options.html), page)
        print_note(f"the page is {options.html}; open it in a browser")
    if options.json:
        print_json(result.summary)
    elif options.quarantined:
        _print_quarantined(result.summary)
    else:
        _print_all(plain_console(), result, options.pair)


def _check_page(options: argparse.Namespace) -> None:
    """Check the options of the page before data are read, which may take minutes.

    Raises:
        SimPOError: they are not valid.
    """
    if options.html_pairs is not None and not options.html:
        raise SimPOError("--html-pairs is for the page; add --html FILE")
    if options.html_pairs is not None and options.html_pairs < 1:
        raise SimPOError(f"--html-pairs is {options.html_pairs}; it must be 1 or more")
    if options.html and not local_path(options.html).parent.is_dir():
        folder = local_path(options.html).parent
        raise SimPOError(f"cannot write {options.html}: there is no folder {folder}; create it")


def _print_quarantined(summary: dict[str, Any]) -> None:
    for record in summary["quarantined_records"]:
        detail = f" ({record['detail']})" if record["detail"] else ""
        print_text(f"{visible(record['source'])}: {record['reason']}{visible(detail)}\n")


def _print_all(console: "Console", result: "Inspection", number: int) -> None:
    from rich.text import Text

    from ..data.inspection import marked
    from ..reporting.remarks import remarks

    summary = result.summary
    console.print(_counts_table(summary))
    if len(summary["sources"]) > 1:
        console.print(_sources_table(summary["sources"]))
    console.print(_lengths_table(summary))
    for remark in remarks(summary):
        console.print(Text.assemble("\n", ("! ", "bold yellow"), visible(remark)), soft_wrap=True)
    pair = result.pairs[number]
    for name, style in (("chosen", "green"), ("rejected", "red")):
        sequence = getattr(pair, name)
        title = f" of {pair.source}: {sequence.num_scored} scored tokens, between ⟦ and ⟧"
        console.print(Text.assemble("\n", (name, "bold"), title))
        console.print(marked(sequence, result.encoder.tokenizer, style))


def _counts_table(summary: dict[str, Any]) -> "Table":
    """Return the table of how many pairs are used, truncated and quarantined."""
    from rich.table import Table

    from ..reporting.remarks import template_text

    has_valid = any(source["role"] == "valid" for source in summary["sources"])
    title = "what will be trained and evaluated on" if has_valid else "what will be trained on"
    table = Table(show_header=False, title=title, title_justify="left")
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"{summary['records']:,}", "records")
    table.add_row(f"{summary['pairs']:,}", "pairs")
    for reason, count in summary["quarantined"].items():
        first = next(q for q in summary["quarantined_records"] if q["reason"] == reason)
        table.add_row(f"{count:,}", f"quarantined: {reason}, e.g. {first['source']}")
    table.add_row(f"{summary['distinct_prompts']:,}", "different prompts")
    table.add_row(f"{summary['prompts_cut']:,}", "prompts truncated on the left")
    table.add_row(f"{summary['responses_cut']:,}", "pairs with a response truncated on the right")
    table.add_row(f"{summary['tokens_cut']:,}", "tokens truncated in all")
    table.add_row(
        f"{summary['boundary_merges']:,}", "pairs with a token that spans prompt and response"
    )
    if summary["template_text"]:
        text = "pairs with text of the template before the response, which is not scored"
        table.add_row(f"{summary['template_text']:,}", text)
    for part, count in summary["dropped"].items():
        table.add_row(f"{count:,}", f"pairs in which the template {template_text(part)}")
    table.add_row(f"{summary['scored_tokens']:,}", f"scored tokens of {summary['tokens']:,}")
    share = summary["length_bias"]["longer_chosen"]
    if share is not None:
        table.add_row(f"{share:.0%}", "of the pairs prefer the longer response")
    return table


def _sources_table(sources: list[dict[str, Any]]) -> "Table":
    """Return the table of the sources, one per line."""
    from rich.table import Table

    table = Table(title="sources", title_justify="left")
    for name in ("", "for", "records", "pairs", "quarantined", "different prompts"):
        is_text = name in ("", "for")
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for source in sources:
        counts = [source["records"], source["pairs"], source["records"] - source["pairs"]]
        cells = [f"{count:,}" for count in (*counts, source["distinct_prompts"])]
        table.add_row(source["name"], source["role"], *cells)
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
