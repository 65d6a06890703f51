"""``mlx-simpo evaluate``."""

import argparse
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..errors import SimPOError
from ..paths import local_path
from .arguments import adapter_config, add_command_with_settings, add_model_and_adapter
from .interrupt import exit_on_interrupt
from .output import announce, plain_console, print_json

if TYPE_CHECKING:
    from ..evaluation import Evaluation

_DATA = ("data.valid=", "data.folder=")  # the settings that name pairs to evaluate on
_NO_DATA = (
    "--data is missing; name the pairs to evaluate on, or a folder with data.folder=…; see "
    "`mlx-simpo evaluate --help`"
)


def add(commands: Any) -> None:
    """Add the command."""
    summary = "measure a model on preference pairs"
    parser = add_command_with_settings(commands, "evaluate", run, summary, "--data DATA")
    add_model_and_adapter(parser)
    parser.sets |= {"data": "data.valid", "split": "data.valid_split"}
    parser.add_argument(
        "--data", help="file, folder or Hub dataset of pairs; default: data.folder or data.valid"
    )
    parser.add_argument("--split", help="split of a folder or Hub dataset")
    parser.add_argument(
        "--per-pair", metavar="FILE", help="also write one JSON line per pair to FILE"
    )


def run(options: argparse.Namespace) -> None:
    """Evaluate, and print a table or JSON.

    With an adapter the JSON's metrics are the adapter's, and those of the base model are in "base".
    Several validation sets are in "valid_sets", by name.

    Raises:
        SimPOError: nothing names the pairs, or data, a model or an adapter cannot be used.
    """
    split = f"data.valid_split={options.split or 'null'}"
    if options.data is None:
        data = (split,) if options.split else ()
    else:
        # What a CONFIG.yaml names is its own validation pairs.
        data = (f"data.valid={options.data}", split, "data.folder=null", "data.valid_main=null")
    if not options.config and not any(s.startswith(_DATA) for s in (*data, *options.settings)):
        raise SimPOError(_NO_DATA)  # before anything is loaded
    config = adapter_config(options, *data)
    if not config.data.valid_sources():
        raise SimPOError(_NO_DATA)
    data_name = options.data or config.data.folder or "data.valid"
    announce(f"evaluating {options.adapter or config.model} on {data_name}")
    with exit_on_interrupt():
        from ..api import evaluate
        from ..files import write_text
        from ..reporting.display import evaluation_table

    sets: dict[str, dict[str, Evaluation]] = {}
    for name, evaluation in evaluate(config, options.adapter).items():
        model, _, valid_set = name.partition("/")
        sets.setdefault(valid_set, {})[model] = evaluation
    if options.per_pair:
        lines = "".join(f"{json.dumps(record)}\n" for record in _per_pair(sets))
        write_text(local_path(options.per_pair), lines)
    if options.json:
        values = {name: _as_dict(models) for name, models in sets.items()}
        print_json({"adapter": options.adapter} | values.pop("", {"valid_sets": values}))
        return
    for name, models in sets.items():
        plain_console().print(evaluation_table(models, name))


def _per_pair(sets: "dict[str, dict[str, Evaluation]]") -> Iterator[dict[str, Any]]:
    """Yield a record per pair, of the adapter if there is one; "set" is the name of its set."""
    for name, models in sets.items():
        for record in models.get("adapter", models["base"]).per_pair():
            yield {"set": name, **record} if name else record


def _as_dict(models: "dict[str, Evaluation]") -> dict[str, Any]:
    """Return the metrics of a set, those of the base model beside an adapter's as "base"."""
    if "adapter" not in models:
        return models["base"].as_dict()
    return {**models["adapter"].as_dict(), "base": models["base"].as_dict()}
