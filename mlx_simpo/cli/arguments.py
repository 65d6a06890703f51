"""Arguments that several commands share, and the configuration that results from them."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..config.simpo_config import SimPOConfig, load_config
from ..errors import SimPOError
from ..paths import local_path

SETTINGS_HELP = (
    "Write settings as name=value or as options: objective.beta=10, --beta 10 (`mlx-simpo train "
    "--help` lists them)."
)
# The keys of `model.loading.DTYPES`, which cannot be imported without MLX.
DTYPES = ("float32", "bfloat16", "float16")

# What a run's settings say of its data, which is not what its adapter is used on.
_OF_THE_RUN = (
    *("train", "train_split", "folder", "valid", "valid_split", "valid_main", "subset"),
    *("columns", "max_samples"),
)

# Returns the exit status; None is 0.
Run = Callable[[argparse.Namespace], int | None]


class Parser(argparse.ArgumentParser):
    """A parser of one command, or of a group of commands; `words` uses it.

    commands: the parsers of a group's commands. takes_settings: whether settings, a configuration
    file and their options may be among the words. named: arguments that may be written as options
    as well, {"--output": "output"}. sets: options that are settings, too, {"model": "model"}.
    without_effect: settings that the command has no use for, and why.
    """

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **more})
        self.commands: Mapping[str, Parser] = {}
        self.takes_settings = False
        self.named: dict[str, str] = {}
        self.sets: dict[str, str] = {}
        self.without_effect: dict[str, str] = {}

    def add_subparsers(self, **more: Any) -> Any:
        """Make this the parser of a group; what is returned is for `add_command`."""
        action = super().add_subparsers(**more)
        self.commands = action.choices
        return action

    def option(self, name: str) -> argparse.Action | None:
        """Return the option of a name, which may have underscores for hyphens."""
        name = name.replace("_", "-") if name.startswith("--") else name
        return next((a for a in self._actions if name in a.option_strings), None)

    def option_names(self) -> list[str]:
        """Return the names of all options, and of the arguments that may be written so."""
        return [name for a in self._actions for name in a.option_strings] + list(self.named)

    def arguments(self) -> list[argparse.Action]:
        """Return the arguments that are not options, in their order."""
        return [action for action in self._actions if not action.option_strings]

    def may_repeat(self, dest: str) -> bool:
        """Return whether an option collects a list."""
        kind = argparse._AppendAction
        return any(action.dest == dest and isinstance(action, kind) for action in self._actions)

    def error(self, message: str) -> NoReturn:
        """Raise a SimPOError, for one line and exit status 2."""
        raise SimPOError(f"{message}; see `{self.prog} --help`")


# --- adding commands -------------------------------------------------------------------------


def add_command(commands: Any, name: str, run: Run, summary: str) -> Parser:
    """Add a command to argparse's ``commands``: it calls ``run`` and has --json."""
    parser = commands.add_parser(name, help=summary, description=_sentence(summary))
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def add_command_with_settings(
    commands: Any, name: str, run: Run, summary: str, required: str = ""
) -> Parser:
    """Add a command that takes a configuration file and settings.

    argparse cannot show those in the usage line, so it is written here: ``required`` is what it
    shows of the command's own arguments, for example "--data DATA".
    """
    parser = add_command(commands, name, run, summary)
    parser.takes_settings = True
    parser.description = f"{_sentence(summary)} {SETTINGS_HELP}"
    parser.add_argument(
        "-c", "--config", metavar="FILE", help="YAML file of settings; CONFIG.yaml is the same"
    )
    words = ("%(prog)s", "[options]", required, "[CONFIG.yaml]", "[name=value ...]")
    parser.usage = " ".join(filter(None, words))
    return parser


def add_argument(
    parser: Parser, dest: str, metavar: str, help: str, *options: str, **more: Any
) -> None:
    """Add an argument that may also be written as one of these options."""
    help = f"{help}; also {' or '.join(options)}"
    parser.add_argument(dest, metavar=metavar, help=help, **more)
    parser.named |= dict.fromkeys(options, dest)


def add_model_and_adapter(parser: Parser) -> None:
    """Add the options that name a model and an adapter, for a command that writes no run."""
    parser.sets["model"] = "model"
    parser.without_effect["output"] = "no folder is written; --json > FILE saves the result"
    parser.add_argument("--model", help="Hub id or folder; default: the adapter's base model")
    parser.add_argument(
        "--adapter",
        "--adapter-path",
        metavar="FOLDER",
        help="adapter to compare with the base model",
    )


def add_base_model(parser: argparse.ArgumentParser, default: str) -> None:
    """Add the options that name the base model of a conversion."""
    parser.add_argument("--model", help=f"Hub id or folder of the base model; default: {default}")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")


def add_conversion_options(parser: argparse.ArgumentParser, dtype: str) -> None:
    """Add the options of every conversion; ``dtype`` is the help of --dtype."""
    parser.add_argument("--dtype", choices=DTYPES, help=dtype)
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        help="compare the logits of both sides and write nothing if they differ; default: if the "
        "model fits into memory in float32",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the model"
    )


def conversion_arguments(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Return these options and those of every conversion, as arguments of a Python function."""
    common = ("dtype", "verify", "trust_remote_code")
    return {name: getattr(options, name) for name in (*names, *common)}


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


# --- the configuration of an adapter -----------------------------------------------------------


def adapter_config(options: argparse.Namespace, *settings: str) -> SimPOConfig:
    """Return the configuration of the adapter's own run, if it has one, changed by the arguments.

    ``settings`` come after what the run has and before what the command line says.

    Raises:
        SimPOError: nothing names the model, a setting is wrong, or the run's settings alone allow
            code that comes with a model.
    """
    model = [f"model={options.model}"] if options.model else []
    if options.config is not None:
        return load_config(options.config, [*model, *settings, *options.settings])
    folder = local_path(options.adapter) if options.adapter else None
    if folder and (folder / "config.yaml").is_file():
        # The data of that run is not what is evaluated now.
        run = [f"data.{name}=null" for name in _OF_THE_RUN]
        template = folder / "chat_template.jinja"
        run += [f"data.chat_template={template}"] if template.is_file() else []
        file = folder / "config.yaml"
        config = load_config(file, [*model, *run, *settings, *options.settings])
        is_allowed = any(s.startswith("trust_remote_code=") for s in options.settings)
        # The folder may come from somebody else, whose word for it does not count.
        if config.trust_remote_code and not is_allowed:
            raise SimPOError(
                f"{file} has trust_remote_code: true, which runs code that comes with "
                f"{config.model}; if you trust that model, add trust_remote_code=true to the "
                "command, else trust_remote_code=false"
            )
        return config
    if not model and not any(s.startswith("model=") for s in options.settings):
        model = [f"model={_model_of(folder)}"]
    return load_config(None, [*model, *settings, *options.settings])


def _model_of(folder: Path | None) -> str:
    """Return the base model that an adapter names; SimPOError if nothing names one."""
    if folder is None:
        raise SimPOError("--model is missing; name a model, or an adapter with --adapter")
    from ..model.adapters import read_adapter_config

    name = read_adapter_config(folder).get("model")
    if not isinstance(name, str):
        raise SimPOError("--model is missing; the adapter does not say which model it belongs to")
    return name
