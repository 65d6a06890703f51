"""The arguments of a chat template: which ones it knows, and which ones it gets."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.meta import find_undeclared_variables
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import InvalidSettingsError

# What mlx-simpo itself passes, and what transformers' apply_chat_template takes for other purposes.
RESERVED = {
    "messages",
    "conversation",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "chat_template",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "sanitize_control_tokens",
    "tokenizer_kwargs",
}
# Functions that transformers puts beside a template's variables.
FUNCTIONS = {"raise_exception", "strftime_now"}
_ENVIRONMENT = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
# Marks in a template, for trainers that score what is between them, that Jinja does not know.
_GENERATION_MARKS = re.compile(r"{%-?\s*(end)?generation\s*-?%}")


def template_variables(text: str) -> set[str]:
    """Return the variables that a template takes: what ``data.template_args`` can set.

    Of a template that is not valid Jinja, every word.
    """
    try:
        tree = _ENVIRONMENT.parse(_GENERATION_MARKS.sub("", text))
    except TemplateSyntaxError:
        names = set(re.findall(r"[^\W\d]\w*", text))
    else:
        # Jinja's function also returns names that are set in a branch or loop and used in it.
        first_use: dict[str, str] = {}
        _add_first_uses(tree, first_use)
        names = {name for name in find_undeclared_variables(tree) if first_use[name] == "load"}
    is_set = RESERVED | FUNCTIONS | _ENVIRONMENT.globals.keys()
    # Special tokens, such as bos_token, are the tokenizer's.
    return {name for name in names if name not in is_set and not name.endswith("_token")}


def _add_first_uses(node: nodes.Node, first_use: dict[str, str]) -> None:
    """Add how each name is used first, "load" or "store", in the order in which a template runs."""
    if isinstance(node, nodes.Name):
        first_use.setdefault(node.name, node.ctx)
    children = list(node.iter_child_nodes())
    if isinstance(node, nodes.Assign):
        children = [node.node, node.target]
    elif isinstance(node, nodes.For):
        children = [node.iter, *(child for child in children if child is not node.iter)]
    for child in children:
        _add_first_uses(child, first_use)


def check_arguments(arguments: Mapping[str, Any], texts: Iterable[str], origin: str) -> None:
    """Check that a template takes all of these arguments: others would change nothing, silently.

    Args:
        texts: the template; several if the tokenizer has several. [] if it is no Jinja text, so
            that what it takes is not known. origin: which template it is, for messages.

    Raises:
        InvalidSettingsError: one line per argument that it does not take.
    """
    texts = list(texts)
    known = set().union(*map(template_variables, texts))
    mistakes = []
    for name in arguments:
        setting = f"data.template_args.{name}"
        if name in RESERVED or name.endswith("_token"):
            mistakes.append(f"{setting} is set, which mlx-simpo passes itself; remove it")
        elif texts and name not in known:
            listed = ", ".join(sorted(known)) or "no arguments"
            mistakes.append(
                f"{setting} is set, but the chat template ({origin}) does not use it; it uses "
                f"{listed}"
            )
    if mistakes:
        raise InvalidSettingsError(mistakes)


def implied_arguments(tokenizer: Any) -> dict[str, bool]:
    """Return what mlx-lm's tokenizer passes to a template when nothing is set.

    It is enable_thinking (in one model's own code "thinking"): true if the tokenizer has tokens for
    thinking. transformers' own tokenizers pass nothing.
    """
    has_thinking = getattr(tokenizer, "has_thinking", None)
    if has_thinking is None:
        return {}
    return {getattr(tokenizer, "_thinking_kwarg", "enable_thinking"): has_thinking}


def describe_arguments(arguments: Mapping[str, Any]) -> str:
    """Return arguments as they are typed: enable_thinking=false, reasoning_effort=low."""
    words = {True: "true", False: "false", None: "null"}
    return ", ".join(
        f"{name}={words[value] if value is None or isinstance(value, bool) else value}"
        for name, value in arguments.items()
    )
