"""``mlx-simpo generate``."""

import argparse
from typing import Any

from .arguments import adapter_config, add_command_with_settings, add_model_and_adapter
from .interrupt import exit_on_interrupt
from .output import announce, print_json, print_text


def add(commands: Any) -> None:
    """Add the command."""
    summary = "generate a response to a prompt"
    parser = add_command_with_settings(commands, "generate", run, summary, "--prompt TEXT")
    add_model_and_adapter(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the user's message")
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=200,
        metavar="N",
        help="maximum length of a response; default: 200",
    )


def run(options: argparse.Namespace) -> None:
    """Print the model's response; with an adapter that of the base model and the adapter's."""
    config = adapter_config(options)
    announce(f"generating with {options.adapter or config.model}")
    with exit_on_interrupt():
        from ..api import generate

    responses = generate(config, options.prompt, options.adapter, max_tokens=options.max_tokens)
    if options.json:
        print_json({"prompt": options.prompt, **responses})
        return
    for name, text in responses.items():
        print_text(f"{name}: {text}\n" if len(responses) > 1 else f"{text}\n")
