"""``mlx-simpo generate``."""

import argparse
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import InvalidSettingsError
from ..sampling.settings import SamplingSettings, Spelling
from .arguments import adapter_config, add_command_with_settings, add_model_and_adapter
from .interrupt import exit_on_interrupt
from .output import announce, print_json
from .responses import (
    cut_note,
    fits_side_by_side,
    response_records,
    stream_columns,
    stream_text,
    wait_for_responses,
)

if TYPE_CHECKING:
    from ..config.simpo_config import SimPOConfig
    from ..sampling.prompts import NamedPrompt
    from ..sampling.responder import Responder

STDIN = "-"
_DEFAULTS = SamplingSettings()
_PROMPTS = "--prompt TEXT | --prompts FILE | --chat"


def option_name(setting: str) -> str:
    """Return the option for a setting; its name is mlx_lm's."""
    return "--temp" if setting == "temperature" else f"--{setting.replace('_', '-')}"


def add(commands: Any) -> None:
    """Add the command."""
    summary = "generate responses to prompts, or chat"
    parser = add_command_with_settings(commands, "generate", run, summary, f"({_PROMPTS})")
    add_model_and_adapter(parser)
    _add_prompts(parser)
    _add_sampling(parser)
    shown = parser.add_argument_group("what is shown")
    shown.add_argument(
        "--no-base", action="store_true", help="leave out the base model beside an adapter"
    )
    shown.add_argument(
        "--side-by-side",
        action=argparse.BooleanOptionalAction,
        help="base model and adapter in two columns; default: in a terminal of 100 columns or more",
    )


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to respond to")
    what.add_argument(
        "-p",
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="the user's message, or - for standard input; may be repeated",
    )
    what.add_argument(
        "--prompts",
        metavar="FILE",
        help="a .txt file with one prompt per line, or records with prompt (text or messages) or "
        "messages, as .jsonl for example; - for standard input",
    )
    what.add_argument("--chat", action="store_true", help="talk to the model in the terminal")
    what.add_argument("--system-prompt", metavar="TEXT", help="a system turn before each prompt")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how to respond")
    how.add_argument(
        "-m",
        "--max-tokens",
        type=int,
        default=_DEFAULTS.max_tokens,
        metavar="N",
        help="maximum length of a response; default: %(default)s",
    )
    how.add_argument(
        "--temp",
        "--temperature",
        dest="temperature",
        type=float,
        default=_DEFAULTS.temperature,
        metavar="T",
        help="0, the default, takes the likeliest token each time; 1 draws them as they are likely",
    )
    how.add_argument(
        "--top-p",
        type=float,
        default=_DEFAULTS.top_p,
        metavar="P",
        help="draw among the likeliest tokens that have this probability together",
    )
    how.add_argument(
        "--top-k",
        type=int,
        default=_DEFAULTS.top_k,
        metavar="K",
        help="draw among the K likeliest tokens",
    )
    how.add_argument(
        "--min-p",
        type=float,
        default=_DEFAULTS.min_p,
        metavar="P",
        help="draw among the tokens that are at least P times as likely as the likeliest one",
    )
    how.add_argument(
        "--seed",
        type=int,
        metavar="N",
        help="of the random numbers, for each prompt; default: another one each time",
    )


def run(options: argparse.Namespace) -> None:
    """Print responses as they are generated, or with --json all of them at the end; or chat.

    Raises:
        SimPOError: options that exclude each other or have no effect, a prompt that cannot be used.
    """
    settings = SamplingSettings(**{name: getattr(options, name) for name in _DEFAULTS.as_dict()})
    problems = [*_conflicts(options), *settings.problems(Spelling(option_name, " "))]
    if problems:
        raise InvalidSettingsError(problems)
    config = adapter_config(options)
    doing = "chatting" if options.chat else "generating"
    announce(f"{doing} with {options.adapter or config.model}")
    with exit_on_interrupt():
        from ..generation import load_responder
        from ..sampling.chat import Chat
        from ..sampling.prompts import check_prompt
        from .chat import run_chat

    if options.chat:
        responder = load_responder(config, options.adapter)
        run_chat(Chat(responder, settings, options.system_prompt), settings.max_tokens)
        return
    prompts = _read_prompts(options, config)
    for prompt in prompts:
        check_prompt(prompt.prompt, prompt.name)  # before a model is loaded
    responder = load_responder(config, options.adapter)
    _print_responses(responder, prompts, settings, options, config.model)


def _print_responses(
    responder: "Responder",
    prompts: "Sequence[NamedPrompt]",
    settings: SamplingSettings,
    options: argparse.Namespace,
    model: str,
) -> None:
    from ..reporting.display import Display
    from ..sampling.prompts import last_text

    sources = responder.sources(base=not options.no_base)
    has_columns = options.side_by_side
    if has_columns is None:
        has_columns = len(sources) > 1 and fits_side_by_side()
    show = wait_for_responses if options.json else stream_columns if has_columns else stream_text
    parts = responder.respond(
        prompts, settings, system_prompt=options.system_prompt, base=not options.no_base
    )
    responses = show(parts, [last_text(prompt.prompt) for prompt in prompts], sources)
    if options.json:
        result = {
            "model": model,
            "adapter": options.adapter,
            "system_prompt": options.system_prompt,
            "sampling": settings.as_dict(),
            "responses": response_records([p.prompt for p in prompts], sources, responses),
        }
        print_json(result)
    Display().note(cut_note([r.finish_reason for r in responses], settings.max_tokens))


def _conflicts(options: argparse.Namespace) -> Iterator[str]:
    """Yield what is missing, and options that have no effect together."""
    if options.chat:
        unused = {
            "--prompt": options.prompt,
            "--prompts": options.prompts,
            "--json": options.json,
            "--no-base": options.no_base,
            "--side-by-side": options.side_by_side,
        }
        for name in (name for name, value in unused.items() if value):
            yield f"{name} has no effect in a chat; leave out {name} or --chat"
        return
    if not options.prompt and options.prompts is None:
        yield 'there is no prompt; add --prompt "What is a comet?", --prompts FILE or --chat'
    if options.prompt.count(STDIN) + (options.prompts == STDIN) > 1:
        yield "- is there twice, and standard input can be read only once; leave one of them out"
    if options.no_base and not options.adapter:
        yield "--no-base leaves nobody to respond; leave it out, or add --adapter FOLDER"
    if options.side_by_side:
        if not options.adapter:
            yield "--side-by-side has no effect without an adapter; add --adapter FOLDER"
        for name, is_there in (("--no-base", options.no_base), ("--json", options.json)):
            if is_there:
                yield f"--side-by-side has no effect with {name}; leave one of them out"


def _read_prompts(options: argparse.Namespace, config: "SimPOConfig") -> "list[NamedPrompt]":
    """Return the prompts of --prompt, and after them those of --prompts."""
    from ..sampling.prompt_files import read_prompts, read_standard_input
    from ..sampling.prompts import named

    prompts = named([read_standard_input() if t == STDIN else t for t in options.prompt])
    if options.prompts is not None:
        prompts += read_prompts(options.prompts, config.data.columns)
    return prompts
