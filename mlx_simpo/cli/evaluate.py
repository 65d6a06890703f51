"""``mlx-simpo evaluate``."""

import argparse
import json
from typing import Any

from ..paths import local_path
from .arguments import adapter_config, add_command_with_settings, add_model_and_adapter
from .interrupt import exit_on_interrupt
from .output import announce, plain_console, print_json


def add(commands: Any) -> None:
    """Add the command."""
    summary = "measure a model on preference pairs"
    parser = add_command_with_settings(commands, "evaluate", run, summary, "--data DATA")
    add_model_and_adapter(parser)
    parser.sets |= {"data": "data.valid", "split": "data.valid_split"}
    parser.add_argument("--data", required=True, help="file, folder or Hub dataset of pairs")
    parser.add_argument("--split", help="split of a folder or Hub dataset")
    parser.add_argument(
        "--per-pair", metavar="FILE", help="also write one JSON line per pair to FILE"
    )


def run(options: argparse.Namespace) -> None:
    """Evaluate, and print a table or JSON.

    With an adapter the JSON's metrics are the adapter's, and those of the base model are in "base".
    """
    # A split that a CONFIG.yaml names is that of its own validation pairs, not of --data.
    data = (f"data.valid={options.data}", f"data.valid_split={options.split or 'null'}")
    config = adapter_config(options, *data)
    announce(f"evaluating {options.adapter or config.model} on {options.data}")
    with exit_on_interrupt():
        from ..api import evaluate
        from ..files import write_text
        from ..reporting.display import evaluation_table

    results = evaluate(config, options.adapter)
    result = results.get("adapter", results["base"])
    if options.per_pair:
        lines = "".join(json.dumps(record) + "\n" for record in result.per_pair())
        write_text(local_path(options.per_pair), lines)
    if options.json:
        base = {"base": results["base"].as_dict()} if "adapter" in results else {}
        print_json({"adapter": options.adapter, **result.as_dict(), **base})
    else:
        plain_console().print(evaluation_table(results))
