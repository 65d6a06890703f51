"""``mlx-simpo convert``: adapters and models between MLX and Hugging Face."""

import argparse
from typing import Any

from .arguments import (
    add_argument,
    add_base_model,
    add_command,
    add_conversion_options,
    conversion_arguments,
)
from .interrupt import exit_on_interrupt
from .output import plain_console, print_conversion, print_json


def add(commands: Any) -> None:
    """Add the command with its actions."""
    about = "Convert adapters and models between MLX and Hugging Face."
    convert = commands.add_parser(
        "convert", help="convert adapters and models to and from Hugging Face", description=about
    )
    actions = convert.add_subparsers(metavar="ACTION", required=True)

    to_peft = add_command(
        actions, "to-peft", run_to_peft, "write an mlx-lm adapter as a PEFT adapter"
    )
    from_peft = add_command(actions, "from-peft", run_from_peft, "write a PEFT adapter for mlx-lm")
    for parser in (to_peft, from_peft):
        add_argument(
            parser, "adapter", "ADAPTER", "folder of the adapter", "--adapter", "--adapter-path"
        )
        add_argument(parser, "output", "OUT", "new folder for the converted adapter", "--output")
        add_base_model(parser, "the one that the adapter names")
        add_conversion_options(parser, "dtype of the adapter's weights; default: as stored")
    to_peft.add_argument(
        "--separate-experts",
        action="store_true",
        help="write a pair of matrices for each expert (for vLLM, and transformers before 5.0) "
        "instead of transformers 5's fused parameters",
    )

    from_hf = add_command(
        actions, "from-hf", run_from_hf, "write a Hugging Face model in MLX's format"
    )
    add_argument(from_hf, "model", "MODEL", "Hub id or folder", "--model")
    add_argument(from_hf, "output", "OUT", "new folder for the model", "--output")
    from_hf.add_argument("--revision", help="branch, tag or commit of a Hub model")
    from_hf.add_argument(
        "--quantize", type=int, metavar="BITS", help="bits per weight: 2, 3, 4, 5, 6 or 8"
    )
    from_hf.add_argument(
        "--group-size",
        type=int,
        default=64,
        metavar="SIZE",
        help="weights that share a scale: 32, 64 (default) or 128",
    )
    add_conversion_options(from_hf, "dtype of weights that are not quantized; default: as stored")

    summary = "list which model types can be converted"
    architectures = add_command(actions, "architectures", run_architectures, summary)
    architectures.description = (
        "List the model types that are converted and by which rule, and those that are not and why."
    )


def run_to_peft(options: argparse.Namespace) -> None:
    """Write a PEFT adapter and print its folder, or the result as JSON."""
    with exit_on_interrupt():
        from ..convert import to_peft

    arguments = conversion_arguments(options, "model", "revision", "separate_experts")
    print_conversion(options, to_peft(options.adapter, options.output, **arguments))


def run_from_peft(options: argparse.Namespace) -> None:
    """Write an mlx-lm adapter and print its folder, or the result as JSON."""
    with exit_on_interrupt():
        from ..convert import from_peft

    arguments = conversion_arguments(options, "model", "revision")
    print_conversion(options, from_peft(options.adapter, options.output, **arguments))


def run_from_hf(options: argparse.Namespace) -> None:
    """Write a model in MLX's format and print its folder, or the result as JSON."""
    with exit_on_interrupt():
        from ..convert import from_hf

    arguments = conversion_arguments(options, "revision", "quantize", "group_size")
    print_conversion(options, from_hf(options.model, options.output, **arguments))


def run_architectures(options: argparse.Namespace) -> None:
    """Print the model types and their rules, as a table or JSON."""
    with exit_on_interrupt():
        from rich.table import Table

        from ..convert.architectures import TABLE

    if options.json:
        print_json({name: {"refused": a.unsupported, "rule": a.note} for name, a in TABLE.items()})
        return
    table = Table(title="model types", title_justify="left")
    table.add_column("model_type")
    table.add_column("converted")
    table.add_column("rule, or reason")
    for name, entry in TABLE.items():
        table.add_row(name, "no" if entry.unsupported else "yes", entry.unsupported or entry.note)
    console = plain_console()
    console.print(table)
    console.print(
        "A type that is not listed is converted only if mlx-lm's own renaming of its checkpoint "
        "shows that the names are the same on both sides."
    )
