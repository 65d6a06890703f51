"""``mlx-simpo fuse``."""

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
from .output import print_conversion

# `convert.fuse.FORMATS`, which cannot be imported without MLX.
FORMATS = ("hf", "mlx")


def add(commands: Any) -> None:
    """Add the command."""
    parser = add_command(commands, "fuse", run, "write a model with its adapter merged in")
    add_argument(parser, "output", "OUT", "new folder for the model", "--output")
    parser.add_argument(
        "--adapter",
        "--adapter-path",
        metavar="FOLDER",
        help="mlx-lm adapter; default: none, only the base model",
    )
    add_base_model(parser, "the one that the adapter was trained on")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        default="hf",
        help="hf (default): for transformers, vLLM and llama.cpp's converter; mlx: for mlx-lm",
    )
    packing = parser.add_mutually_exclusive_group()
    packing.add_argument(
        "--dequantize",
        action="store_true",
        default=None,
        help="unpack a quantized base model, in float32 (default)",
    )
    packing.add_argument(
        "--quantize",
        dest="dequantize",
        action="store_false",
        default=None,
        help="quantize the changed layers of a quantized base model again (--format mlx), which "
        "rounds away much of what a short training changed",
    )
    add_conversion_options(
        parser, "dtype of the weights; default: as stored, or float32 if unpacked"
    )


def run(options: argparse.Namespace) -> None:
    """Write the merged model and print its folder, or the result as JSON."""
    with exit_on_interrupt():
        from ..convert import fuse

    names = ("adapter", "model", "revision", "format", "dequantize")
    print_conversion(options, fuse(options.output, **conversion_arguments(options, *names)))
