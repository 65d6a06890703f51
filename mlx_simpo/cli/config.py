"""``mlx-simpo config``: the settings of a file and a command line, and their origins."""

import argparse
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

from ..config.schema import all_settings
from ..config.simpo_config import SimPOConfig, load_config, read_file, read_lines
from ..config.yaml import dump_inline
from .arguments import add_command_with_settings
from .output import escaped, print_json, print_note, print_text

_COLUMN = 40  # where comments begin, if the values are not longer
_NO_MODEL = "model is not set; a run needs it: model=…"


def add(commands: Any) -> None:
    """Add the command."""
    summary = "print all settings as YAML, and where each comes from"
    add_command_with_settings(commands, "config", run, summary)


def run(options: argparse.Namespace) -> None:
    """Print the settings as a configuration file, or as JSON with their origins.

    Without a model all others are printed all the same: that is a file to begin with.
    """
    has_model = "model" in options.origins or read_file(options.config).get("model") is not None
    model = [] if has_model else ["model=model"]
    values = load_config(options.config, [*model, *options.settings]).as_dict()
    origins = dict(_origins(options))
    if not has_model:
        values["model"] = None
        print_note(_NO_MODEL)
    if options.json:
        print_json({"settings": values, "origins": origins})
    else:
        print_text("".join(f"{line}\n" for line in _yaml_lines(values, origins)))


def _origins(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Yield each setting and where its value comes from: "default", FILE:line, or words."""
    lines = read_lines(options.config)
    for name, _, _ in all_settings(SimPOConfig):
        parts = {n: t for n, t in options.origins.items() if n == name or n.startswith(f"{name}.")}
        # A part that is typed (data.columns.prompt) is added to what the file has.
        in_file = [f"{options.config}:{lines[name]}"] if name in lines and name not in parts else []
        yield name, " and ".join([*in_file, *parts.values()]) or "default"


def _yaml_lines(values: Mapping[str, Any], origins: Mapping[str, str]) -> Iterator[str]:
    """Yield the lines of a configuration file, with the origins as comments."""
    opened: set[str] = set()
    for name, item, _ in all_settings(SimPOConfig):
        *sections, leaf = name.split(".")
        for depth, section in enumerate(sections):
            path = ".".join(sections[: depth + 1])
            if path not in opened:
                opened.add(path)
                yield f"{'  ' * depth}{section}:"
        value = reduce(lambda inner, key: inner[key], name.split("."), values)
        if name == "model" and value is None:
            yield f"# model:  # not set: {item.metadata['help']}"
            continue
        text = f"{'  ' * len(sections)}{leaf}: {dump_inline(value)}"
        yield f"{text.ljust(_COLUMN - 2)}  # {escaped(origins[name])}"
