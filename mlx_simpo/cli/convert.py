"""The commands between MLX and Hugging Face: ``mlx-simpo fuse`` and ``mlx-simpo convert …``."""

import argparse
import sys
from typing import Any

from rich.table import Table

from ..convert.fuse import FORMATS
from ..model.loading import DTYPES
from .output import plain_console, print_json, refuse_settings


def add_fuse(commands: Any) -> None:
    """Add the fuse command to argparse's ``commands``."""
    fuse = add(commands, "fuse", run_fuse, "write a model with its adapter merged in")
    fuse.add_argument("output", metavar="OUT", help="new folder for the model")
    fuse.add_argument("--adapter", metavar="FOLDER", help="mlx-lm adapter; none: the model alone")
    add_base(fuse, "default: the model that the adapter was trained on")
    fuse.add_argument(
        "--format",
        choices=FORMATS,
        default="hf",
        help="hf (default): for transformers, vLLM and llama.cpp's converter; mlx: for mlx-lm",
    )
    packing = fuse.add_mutually_exclusive_group()
    packing.add_argument(
        "--dequantize",
        action="store_true",
        default=None,
        help="unpack a quantized base, in float32 (default)",
    )
    packing.add_argument(
        "--quantize",
        dest="dequantize",
        action="store_false",
        default=None,
        help="pack the changed layers of a quantized base again (--format mlx), which rounds much "
        "of a small tune away",
    )
    add_common(fuse, "of the weights; default: as they are, float32 if they were packed")


def add_convert(commands: Any) -> None:
    """Add the convert command with its actions to argparse's ``commands``."""
    about = "Convert adapters and models between MLX and Hugging Face."
    convert = commands.add_parser("convert", help="to and from Hugging Face", description=about)
    actions = convert.add_subparsers(metavar="ACTION", required=True)

    to_peft = add(actions, "to-peft", run_to_peft, "write an mlx-lm adapter as a PEFT adapter")
    from_peft = add(actions, "from-peft", run_from_peft, "write a PEFT adapter for mlx-lm")
    for parser in (to_peft, from_peft):
        parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter")
        parser.add_argument("output", metavar="OUT", help="new folder for the converted adapter")
        add_base(parser, "base model; default: the one that the adapter names")
        add_common(parser, "of the adapter's weights; default: as they are")
    to_peft.add_argument(
        "--separate-experts",
        action="store_true",
        help="a pair of matrices for each expert (vLLM, transformers before 5.0) instead of "
        "transformers 5's fused parameters",
    )

    from_hf = add(actions, "from-hf", run_from_hf, "write a Hugging Face model in MLX's format")
    from_hf.add_argument("model", metavar="MODEL", help="Hub id or folder")
    from_hf.add_argument("output", metavar="OUT", help="new folder for the model")
    from_hf.add_argument("--revision", help="branch, tag or commit of a Hub model")
    from_hf.add_argument("--quantize", type=int, metavar="BITS", help="2, 3, 4, 5, 6 or 8")
    from_hf.add_argument("--group-size", type=int, default=64, help="32, 64 (default) or 128")
    add_common(from_hf, "of weights that are not packed; default: as stored")

    known = add(actions, "architectures", run_architectures, "list what can be converted, and how")
    known.description = "List the model types that are converted, by which rule, or why not."


def add(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    """One command without settings."""
    about = f"{summary[0].upper()}{summary[1:]}."
    parser = commands.add_parser(name, help=summary, description=about)
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def add_base(parser: argparse.ArgumentParser, default: str) -> None:
    """The options that name the base model."""
    parser.add_argument("--model", help=f"Hub id or folder; {default}")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")


def add_common(parser: argparse.ArgumentParser, dtype: str) -> None:
    """The options that every conversion has."""
    parser.add_argument("--dtype", choices=tuple(DTYPES), help=dtype)
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare the logits of both sides and write nothing if they differ; default: where "
        "the model fits into memory in float32",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )


def given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """These options and the common ones, as arguments of the Python functions."""
    common = ("dtype", "verify", "trust_remote_code")
    return {name: getattr(options, name) for name in (*names, *common)}


def finish(options: argparse.Namespace, result: Any) -> None:
    """The folder that was written, to stdout."""
    if options.json:
        print_json(result.as_dict())
    else:
        sys.stdout.write(f"{result.output}\n")


def run_fuse(options: argparse.Namespace) -> None:
    """The fuse command."""
    from ..convert import fuse

    refuse_settings(options, "fuse")
    arguments = given(options, "adapter", "model", "revision", "format", "dequantize")
    finish(options, fuse(options.output, **arguments))


def run_to_peft(options: argparse.Namespace) -> None:
    """The convert to-peft command."""
    from ..convert import to_peft

    refuse_settings(options, "convert")
    arguments = given(options, "model", "revision", "separate_experts")
    finish(options, to_peft(options.adapter, options.output, **arguments))


def run_from_peft(options: argparse.Namespace) -> None:
    """The convert from-peft command."""
    from ..convert import from_peft

    refuse_settings(options, "convert")
    finish(
        options, from_peft(options.adapter, options.output, **given(options, "model", "revision"))
    )


def run_from_hf(options: argparse.Namespace) -> None:
    """The convert from-hf command."""
    from ..convert import from_hf

    refuse_settings(options, "convert")
    arguments = given(options, "revision", "quantize", "group_size")
    finish(options, from_hf(options.model, options.output, **arguments))


def run_architectures(options: argparse.Namespace) -> None:
    """The convert architectures command."""
    from ..convert.architectures import TABLE

    refuse_settings(options, "convert")
    if options.json:
        print_json({name: {"refused": a.unsupported, "rule": a.note} for name, a in TABLE.items()})
        return
    table = Table(title="model types", title_justify="left")
    table.add_column("model_type")
    table.add_column("")
    table.add_column("rule, or reason")
    for name, entry in TABLE.items():
        table.add_row(
            name, "refused" if entry.unsupported else "yes", entry.unsupported or entry.note
        )
    console = plain_console()
    console.print(table)
    console.print(
        "A type that is not listed is converted only if mlx-lm's own renaming of its checkpoint "
        "proves that the names are the same on both sides."
    )
