"""``mlx-simpo train``."""

import argparse
import json
from typing import Any

from ..config.schema import all_settings, is_required
from ..config.simpo_config import SimPOConfig, load_config
from .arguments import add_command_with_settings
from .interrupt import exit_on_interrupt
from .output import announce, print_json, print_text


def add(commands: Any) -> None:
    """Add the command, whose help lists every setting."""
    parser = add_command_with_settings(commands, "train", run, "train an adapter")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _settings_list()


def run(options: argparse.Namespace) -> None:
    """Train, with progress on stderr, and print the adapter's folder or the result as JSON."""
    config = load_config(options.config, options.settings)
    announce(f"training {config.model}, output in {config.output}")
    with exit_on_interrupt():
        from ..api import train

    result = train(config)
    if options.json:
        print_json(result.as_dict())
    else:
        print_text(f"{result.adapter}\n")


def _settings_list() -> str:
    """Return every setting with its meaning and default, for argparse."""
    lines = ["settings, for the YAML file and as name=value:"]
    for name, item, _ in all_settings(SimPOConfig):
        default = "required" if is_required(item) else f"default {_yaml_text(item.default)}"
        lines.append(f"  {name}\n      {item.metadata['help']} ({default})")
    return "\n".join(lines).replace("%", "%%")


def _yaml_text(value: Any) -> str:
    """Return a value on one line, as a settings file would have it."""
    return json.dumps(value) if not isinstance(value, str) else value
