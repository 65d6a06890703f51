"""Choose the chat template and write conversations as text with it."""

from collections.abc import Mapping
from copy import copy
from typing import Any

from jinja2 import TemplateError

from ..errors import SimPOError, one_line
from ..paths import local_path
from .messages import as_messages
from .records import Pair
from .rows import InvalidRecordError, Message
from .template_args import (
    check_arguments,
    describe_arguments,
    implied_arguments,
    template_variables,
)

# Expressions in a template run on a record's content: they raise whatever Python's operators raise.
# mlx-lm's templates in Python assert what they require of a conversation.
TEMPLATE_ERRORS = (
    TemplateError,
    AssertionError,
    NotImplementedError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)


class Renderer:
    """Writes conversations as text with the template that ``data.chat_template`` selects.

    Args:
        tokenizer: mlx-lm's, which wraps transformers' own.
        chat_template: "auto", "none", a template file, or the text of a template.
        arguments: further arguments of the template (``data.template_args``), passed whenever it
            writes: prompts and whole conversations, in training, evaluation and generation.

    Attributes:
        text: the template's Jinja text. None for plain text, for a model with several templates
            (the tokenizer chooses), and for one whose template is Python code in mlx-lm.
        variables: names that ``arguments`` may have; empty if there is no Jinja text.
        is_plain_text: there is no template; records are scored as plain text.
        origin: which template is used and why, with which arguments, for the user to read.

    Raises:
        SimPOError: chat_template is none of these, or the template does not use an argument.
    """

    def __init__(
        self,
        tokenizer: Any,
        chat_template: str = "auto",
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        own = getattr(tokenizer, "chat_template", None)
        has_own = getattr(tokenizer, "has_chat_template", own is not None)
        self.tokenizer = tokenizer
        self.text: str | None = None
        self._options: dict[str, Any] = {}
        self.is_plain_text = False
        if chat_template == "none":
            self.is_plain_text = True
            self.origin = "none, as requested: plain text, prompt + response + EOS"
        elif chat_template != "auto":
            self.text, self.origin = read_template(chat_template)
            self._options = {"chat_template": self.text}
        elif has_own:
            self.origin = "the tokenizer's own"
            self.text = own if isinstance(own, str) else None
        else:
            self.is_plain_text = True
            self.origin = "none, the tokenizer has none: plain text, prompt + response + EOS"
        texts = [] if self.text is None else [self.text]
        if isinstance(own, dict) and not (texts or self.is_plain_text):
            texts = list(own.values())
        self.variables: set[str] = set().union(*map(template_variables, texts))
        self._add_arguments(arguments or {}, texts)

    def _add_arguments(self, arguments: Mapping[str, Any], texts: list[str]) -> None:
        """Pass ``arguments`` from now on; SimPOError if the template does not use one of them."""
        if self.is_plain_text:
            if arguments:
                raise SimPOError(
                    f"data.template_args is set ({describe_arguments(arguments)}), but the chat "
                    f"template is {self.origin}; remove data.template_args"
                )
            return
        check_arguments(arguments, texts, self.origin)
        self._options |= arguments
        used = implied_arguments(self.tokenizer)
        used = {name: value for name, value in used.items() if name in self.variables}
        if arguments:
            self.origin += f", with {describe_arguments({**used, **arguments})}"
        elif used:
            self.origin += f", with {describe_arguments(used)} (mlx-lm's choice for this tokenizer)"

    def with_arguments(self, arguments: Mapping[str, Any]) -> "Renderer":
        """Return a renderer that passes these arguments, too, or with these values."""
        changed = copy(self)
        changed._options = {**self._options, **arguments}
        return changed

    def conversation(self, pair: Pair) -> tuple[list[Message], list[Message], list[Message]]:
        """Return (prompt, chosen, rejected) as messages; strings become one user turn and one
        assistant turn.

        Raises:
            SimPOError: the pair is a conversation but there is no template to write it with.
        """
        if self.is_plain_text and not isinstance(pair.prompt, str):
            raise SimPOError(
                f"{pair.source} is a conversation, and the chat template is {self.origin}; set "
                "data.chat_template to a template file, or use records whose prompt, chosen and "
                "rejected are strings"
            )
        return (
            as_messages(pair.prompt, "user"),
            as_messages(pair.chosen, "assistant"),
            as_messages(pair.rejected, "assistant"),
        )

    def render(
        self,
        messages: list[Message],
        tools: list | None = None,
        *,
        generation: bool = False,
    ) -> str:
        """Return the text of a conversation; with the next response's header if ``generation``.

        Raises:
            InvalidRecordError: the template rejects this conversation.
        """
        options = self._options if tools is None else {**self._options, "tools": tools}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **options
            )
        except TEMPLATE_ERRORS as error:
            raise InvalidRecordError("rejected by the chat template", one_line(error)) from None


def read_template(setting: str) -> tuple[str, str]:
    """Return (template text, its origin) for a file name or the text of a template.

    Raises:
        SimPOError: it is neither Jinja text nor a readable UTF-8 file.
    """
    if "{%" in setting or "{{" in setting:
        return setting, "the text in data.chat_template"
    try:
        return local_path(setting).read_text(encoding="utf-8"), f"the file {setting}"
    except (OSError, ValueError, SimPOError) as error:
        raise SimPOError(
            f"data.chat_template is {setting!r}; it must be auto, none, a readable template file "
            f"or Jinja text ({error})"
        ) from None


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of ``text``, without adding special ones.

    Raises:
        InvalidRecordError: it is not valid Unicode (JSON can hold half of a surrogate pair).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRecordError("invalid Unicode text", error.reason) from None
    return tokenizer.encode(text, add_special_tokens=False)
