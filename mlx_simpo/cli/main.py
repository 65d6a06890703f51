"""The command line: ``mlx-simpo train | evaluate | generate | fuse | convert | push | …``.

Results go to stdout, everything else to stderr. Settings are given as ``section.name=value``, the
same names as in the YAML files.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from rich.text import Text

from ..config.schema import all_settings, is_required, nearest_name
from ..config.simpo_config import SimPOConfig, load_config
from ..errors import SimPOError
from ..files import write_text
from ..paths import local_path
from ..reporting.display import evaluation_table
from ..version import __version__
from .convert import add_convert, add_fuse
from .output import counts_table, lengths_table, plain_console, print_json, refuse_settings
from .push import add_push

SETTINGS_HELP = "settings, name=value: objective.beta=10 lora.rank=16 (train --help lists them)"


def run_command(arguments: Sequence[str]) -> int:
    """Run one command and return the exit status: 0, 2 for bad input, 130 for Ctrl-C.

    A training that is interrupted after its first step saves its adapter and ends with 0.
    """
    try:
        options, rest = build_parser().parse_known_args(arguments)
        options.config, options.settings = config_and_settings(rest)
        options.run(options)
    except SimPOError as error:
        line = "".join(
            c if c.isprintable() else repr(c)[1:-1] for c in " ".join(str(error).split())
        )
        sys.stderr.write(f"mlx-simpo: error: {line}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("mlx-simpo: interrupted\n")
        return 130
    return 0


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the command line in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        """One line and exit status 2, as for every other mistake."""
        raise SimPOError(f"{message}; see `{self.prog} --help`")


def build_parser() -> argparse.ArgumentParser:
    """The command line with all its commands."""
    parser = Parser(
        prog="mlx-simpo", description="SimPO LoRA fine-tuning of language models on MLX."
    )
    parser.add_argument("--version", action="version", version=f"mlx-simpo {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = add_command(commands, "train", "", run_train, "train an adapter")
    train.formatter_class = argparse.RawDescriptionHelpFormatter
    train.epilog = settings_list()

    evaluate = add_command(
        commands, "evaluate", "--data DATA", run_evaluate, "measure a model on pairs"
    )
    add_model_options(evaluate)
    evaluate.add_argument("--data", required=True, help="file, folder or Hub data set of pairs")
    evaluate.add_argument("--split", help="split of a folder or Hub data set")
    evaluate.add_argument("--per-pair", metavar="FILE", help="write a JSON line a pair to FILE")

    generate = add_command(commands, "generate", "--prompt TEXT", run_generate, "answer a prompt")
    add_model_options(generate)
    generate.add_argument("--prompt", required=True, metavar="TEXT", help="what the user says")
    generate.add_argument("--max-tokens", type=int, default=200, help="default 200")

    data = commands.add_parser("data", help="look at data", description="Look at data.")
    actions = data.add_subparsers(metavar="ACTION", required=True)
    inspect = add_command(
        actions,
        "inspect",
        "DATA",
        run_inspect,
        "show what would be trained, and how",
    )
    inspect.add_argument("data", help="file, folder or Hub data set of pairs")
    inspect.add_argument("--model", help="Hub id or folder, whose tokenizer is used")
    inspect.add_argument("--split", help="split of a folder or Hub data set")
    inspect.add_argument("--pair", type=int, default=0, help="which pair to show, from 0")

    add_fuse(commands)
    add_convert(commands)
    add_push(commands)

    about = "Show the machine, which kernel runs and why, whether it is right, and how fast it is."
    doctor = commands.add_parser("doctor", help="check this machine", description=about)
    doctor.set_defaults(run=run_doctor)
    doctor.add_argument("--json", action="store_true", help="print it all as one JSON object")
    return parser


def add_command(
    commands: Any, name: str, needed: str, run: Any, summary: str
) -> argparse.ArgumentParser:
    """One command that takes a configuration and settings."""
    about = f"{summary.capitalize()}. After the options come {SETTINGS_HELP}."
    parser = commands.add_parser(name, help=summary, description=about)
    parser.usage = f"%(prog)s [options] {needed} [CONFIG.yaml] [name=value ...]".replace("  ", " ")
    parser.set_defaults(run=run)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return parser


def config_and_settings(rest: Sequence[str]) -> tuple[str | None, list[str]]:
    """(configuration file, settings) among the arguments that argparse left over."""
    for argument in rest:
        if argument.startswith("-"):
            name = argument.lstrip("-").partition("=")[0].replace("-", "_")
            hint = nearest_name(name, SimPOConfig)
            raise SimPOError(f"unknown option {argument!r}; settings are given as name=value{hint}")
    files = [argument for argument in rest if "=" not in argument]
    if len(files) > 1:
        raise SimPOError(f"one configuration file at most, not {' and '.join(files)}")
    return files[0] if files else None, [argument for argument in rest if "=" in argument]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that name a model and an adapter."""
    parser.add_argument("--model", help="Hub id or folder; default: the model of the adapter's run")
    parser.add_argument("--adapter", metavar="FOLDER", help="adapter, compared with the bare model")


def settings_list() -> str:
    """Every setting with its default and meaning, for train --help."""
    lines = ["settings, for the YAML file and as name=value:"]
    for name, item, _ in all_settings(SimPOConfig):
        default = "required" if is_required(item) else f"default {yaml_text(item.default)}"
        lines.append(f"  {name}\n      {item.metadata['help']} ({default})")
    return "\n".join(lines).replace("%", "%%")


def yaml_text(value: Any) -> str:
    """A value as it would stand in a settings file, on one line."""
    return json.dumps(value) if not isinstance(value, str) else value


def run_train(options: argparse.Namespace) -> None:
    """The train command: the table to stderr, the result with --json to stdout."""
    from ..api import train

    result = train(load_config(options.config, options.settings))
    if options.json:
        print_json(result.as_dict())
    else:
        sys.stdout.write(f"{result.adapter}\n")


def adapter_config(options: argparse.Namespace, *settings: str) -> SimPOConfig:
    """The configuration of the adapter's own run if it has one, with what the command line says."""
    given = [f"model={options.model}"] if options.model else []
    folder = local_path(options.adapter) if options.adapter else None
    own = folder / "config.yaml" if folder and (folder / "config.yaml").is_file() else None
    own = own if options.config is None else None
    if own is None and options.config is None and not given:
        from ..model.adapters import read_adapter_config

        named = read_adapter_config(folder).get("model") if folder else None
        if not isinstance(named, str):
            raise SimPOError(
                "--model is missing; the adapter's folder does not say which it belongs to"
            )
        given = [f"model={named}"]
    if own is not None:
        given += ["data.valid=null", "data.valid_split=null", "data.subset=null"]
        template = own.with_name("chat_template.jinja")
        given += [f"data.chat_template={template}"] if template.is_file() else []
    return load_config(own or options.config, [*given, *settings, *options.settings])


def run_evaluate(options: argparse.Namespace) -> None:
    """The evaluate command."""
    from ..api import evaluate

    settings = [f"data.valid={options.data}"]
    # A split that a CONFIG.yaml names is that of its own validation pairs.
    settings += [f"data.valid_split={options.split or 'null'}"]
    results = evaluate(adapter_config(options, *settings), options.adapter)
    result = results.get("adapter", results["base"])
    if options.per_pair:
        lines = "".join(json.dumps(record) + "\n" for record in result.per_pair())
        write_text(local_path(options.per_pair), lines)
    if options.json:
        base = {"base": results["base"].as_dict()} if "adapter" in results else {}
        print_json({"adapter": options.adapter, **result.as_dict(), **base})
    else:
        plain_console().print(evaluation_table(results))


def run_generate(options: argparse.Namespace) -> None:
    """The generate command."""
    from ..api import generate

    answers = generate(
        adapter_config(options), options.prompt, options.adapter, max_tokens=options.max_tokens
    )
    if options.json:
        print_json({"prompt": options.prompt, **answers})
        return
    for name, text in answers.items():
        sys.stdout.write(f"{name}: {text}\n" if len(answers) > 1 else f"{text}\n")


def run_inspect(options: argparse.Namespace) -> None:
    """The data inspect command."""
    from ..api import inspect
    from ..data.inspection import marked

    given = [f"model={options.model}"] if options.model else []
    config = load_config(options.config, [*given, *options.settings])
    found = inspect(config, options.data, options.split)
    if not 0 <= options.pair < len(found.pairs):
        raise SimPOError(f"--pair is {options.pair}; it must be 0 to {len(found.pairs) - 1}")
    if options.json:
        print_json(found.summary)
        return
    pair = found.pairs[options.pair]
    console = plain_console()
    console.print(counts_table(found.summary))
    console.print(lengths_table(found.summary))
    for name, style in (("chosen", "green"), ("rejected", "red")):
        side = getattr(pair, name)
        title = f" of {pair.source}: {side.num_scored} scored tokens, between ⟦ and ⟧"
        console.print(Text.assemble("\n", (name, "bold"), title))
        console.print(marked(side, found.encoder.tokenizer, style))


def run_doctor(options: argparse.Namespace) -> None:
    """The doctor command; an error if a check fails."""
    from ..doctor import as_text, examine

    refuse_settings(options, "doctor")
    found = examine()
    if options.json:
        print_json(found)
    else:
        sys.stdout.write(as_text(found))
    if "problem" in found or not all(check["passed"] for check in found["checks"]):
        raise SimPOError(
            "log-probabilities are not right on this machine; please report the lines above"
        )
