"""Arguments that several commands share, and the configuration that results from them."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from ..config.schema import nearest_name
from ..config.simpo_config import SimPOConfig, load_config
from ..errors import SimPOError
from ..paths import local_path

SETTINGS_HELP = (
    "Write settings as name=value: objective.beta=10 (`mlx-simpo train --help` lists them)."
)
# The keys of `model.loading.DTYPES`, which cannot be imported without MLX.
DTYPES = ("float32", "bfloat16", "float16")

# Returns the exit status; None is 0.
Run = Callable[[argparse.Namespace], int | None]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        """Raise a SimPOError, for one line and exit status 2."""
        raise SimPOError(f"{message}; see `{self.prog} --help`")


# --- adding commands -------------------------------------------------------------------------


def add_command(commands: Any, name: str, run: Run, summary: str) -> argparse.ArgumentParser:
    """Add a command to argparse's ``commands``: it calls ``run`` and has --json."""
    parser = commands.add_parser(name, help=summary, description=_sentence(summary))
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def add_command_with_settings(
    commands: Any, name: str, run: Run, summary: str, required: str = ""
) -> argparse.ArgumentParser:
    """Add a command that takes a configuration file and settings.

    argparse cannot show those in the usage line, so it is written here: ``required`` is what it
    shows of the command's own arguments, for example "--data DATA".
    """
    parser = add_command(commands, name, run, summary)
    parser.description = f"{_sentence(summary)} {SETTINGS_HELP}"
    words = ("%(prog)s", "[options]", required, "[CONFIG.yaml]", "[name=value ...]")
    parser.usage = " ".join(filter(None, words))
    return parser


def add_model_and_adapter(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a model and an adapter."""
    parser.add_argument("--model", help="Hub id or folder; default: the adapter's base model")
    parser.add_argument(
        "--adapter", metavar="FOLDER", help="adapter to compare with the base model"
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


# --- configuration and settings --------------------------------------------------------------


def config_and_settings(rest: Sequence[str]) -> tuple[str | None, list[str]]:
    """Return the configuration file and the settings among arguments that are not options.

    Raises:
        SimPOError: an unknown option, or two files.
    """
    for argument in rest:
        if argument.startswith("-"):
            name = argument.lstrip("-").partition("=")[0].replace("-", "_")
            hint = nearest_name(name, SimPOConfig)
            raise SimPOError(
                f"unknown option {argument!r}; settings are written as name=value{hint}"
            )
    files = [argument for argument in rest if "=" not in argument]
    if len(files) > 1:
        raise SimPOError(
            f"one configuration file at most, not {' and '.join(files)}; settings are written as "
            "name=value, without spaces"
        )
    return files[0] if files else None, [argument for argument in rest if "=" in argument]


def reject_settings(options: argparse.Namespace, command: str) -> None:
    """Reject settings and configuration files for a command that takes none.

    Raises:
        SimPOError: there is a setting or a file.
    """
    if options.config or options.settings:
        extra = options.config or options.settings[0]
        raise SimPOError(f"{command} takes no settings; leave out {extra!r}")


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
        names = ("train", "train_split", "folder", "valid", "valid_split", "valid_main", "subset")
        run = [f"data.{name}=null" for name in (*names, "columns", "max_samples")]
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
    if not model:
        from ..model.adapters import read_adapter_config

        name = read_adapter_config(folder).get("model") if folder else None
        if not isinstance(name, str):
            raise SimPOError(
                "--model is missing; "
                + (
                    "the adapter does not say which model it belongs to"
                    if folder
                    else "name a model, or an adapter with --adapter"
                )
            )
        model = [f"model={name}"]
    return load_config(None, [*model, *settings, *options.settings])
