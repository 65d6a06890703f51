"""``mlx-simpo train``."""

import argparse
import inspect
import json
import shutil
import textwrap
from typing import Any

from ..config.schema import all_settings, section_classes
from ..config.simpo_config import SimPOConfig, load_config, resume_config
from ..config.value_types import is_required
from ..errors import SimPOError
from .arguments import add_command_with_settings
from .interrupt import exit_on_interrupt
from .output import announce, print_json, print_text


def add(commands: Any) -> None:
    """Add the command, whose help lists every setting."""
    parser = add_command_with_settings(commands, "train", run, "train an adapter")
    parser.description = (
        "Train an adapter. Settings come from a YAML file, from name=value, and from\n"
        "options: --model, --data, --output, --seed, --learning-rate, --lora-rank …\n\n"
        "Exit status: 0; 2: bad input; 3: the model is worse after training than before;\n"
        "130, 143, 129: interrupted by Ctrl-C, SIGTERM or SIGHUP, and saved."
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        help="continue the run in this folder, with its settings and those given here",
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _settings_list()


def run(options: argparse.Namespace) -> int:
    """Train, with progress on stderr, and print the adapter's folder or the result as JSON.

    Returns:
        The exit status; see `training.result.TrainResult.exit_status`.

    Raises:
        SimPOError: invalid input, or a run that cannot go on.
    """
    if options.resume is None:
        config = load_config(options.config, options.settings)
        announce(f"training {config.model}, output in {config.output}")
    elif options.config is not None:
        raise SimPOError(
            f"--resume takes the settings of the run in {options.resume}; leave out "
            f"{options.config}, and write what changes as name=value"
        )
    else:
        config = resume_config(options.resume, options.settings)
        announce(f"resuming {config.output}, training {config.model}")
    with exit_on_interrupt():
        from ..api import train

    result = train(config, resume=options.resume is not None)
    if options.json:
        print_json(result.as_dict())
    else:
        print_text(f"{result.adapter}\n")
    return result.exit_status


def _settings_list() -> str:
    """Return every setting with its meaning and default, by sections, for argparse."""
    width = max(40, shutil.get_terminal_size().columns - 2)  # argparse's own width
    sections: dict[str, list[str]] = {}
    for name, item, _ in all_settings(SimPOConfig):
        default = "required" if is_required(item) else f"default {_yaml_text(item.default)}"
        words = textwrap.wrap(
            f"{item.metadata['help']} ({default})", width - 6, break_on_hyphens=False
        )
        lines = sections.setdefault(name.rpartition(".")[0], [])
        lines += [f"  {name}", *(f"      {line}" for line in words)]
    texts = ["\n".join([_heading(section), *lines]) for section, lines in sections.items()]
    title = "settings, in the YAML file, as name=value or as --name value:"
    return "\n\n".join([title, *texts]).replace("%", "%%")


def _heading(section: str) -> str:
    """Return what the settings of a section are about."""
    if not section:
        return "the run"
    cls = next(cls for cls in section_classes(SimPOConfig) if section == cls.NAME)
    about = (inspect.getdoc(cls) or "").partition("\n")[0].rstrip(".")
    return f"{section}: {about[0].lower()}{about[1:]}"


def _yaml_text(value: Any) -> str:
    """Return a value on one line, as a settings file would have it."""
    return json.dumps(value) if not isinstance(value, str) else value
