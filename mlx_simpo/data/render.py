"""Which chat template runs, and the text it makes of a conversation."""

from typing import Any

from jinja2 import TemplateError

from ..errors import SimPOError, one_line
from ..paths import local_path
from .records import InvalidRecordError, Message, Pair, as_messages

# A template's expressions run on a record's content: they raise what Python's operators raise.
TEMPLATE_ERRORS = (
    TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)


class Renderer:
    """Turns conversations into text with the template that ``data.chat_template`` asks for.

    Args:
        tokenizer: mlx-lm's or transformers' tokenizer.
        chat_template: "auto", "none", a template file, or the template's text.

    Attributes:
        text: the template's Jinja text, or None where records are plain text (or where the
            model has several templates, or a renderer in Python in mlx-lm).
        plain: records are scored as plain text.
        origin: which template runs and why, for the user to read.
    """

    def __init__(self, tokenizer: Any, chat_template: str = "auto") -> None:
        own = getattr(tokenizer, "chat_template", None)
        has_own = getattr(tokenizer, "has_chat_template", own is not None)
        self.tokenizer = tokenizer
        self.text: str | None = None
        self._options: dict[str, Any] = {}
        self.plain = False
        if chat_template == "none":
            self.plain, self.origin = True, "none, as asked for: plain text, prompt + answer + EOS"
        elif chat_template != "auto":
            self.text, self.origin = read_template(chat_template)
            self._options = {"chat_template": self.text}
        elif has_own:
            self.origin = "the tokenizer's own"
            self.text = (
                own if isinstance(own, str) else None
            )  # several, by name: the tokenizer picks
        else:
            self.plain = True
            self.origin = "none, the tokenizer has none: plain text, prompt + answer + EOS"

    def conversation(self, pair: Pair) -> tuple[list[Message], list[Message], list[Message]]:
        """(prompt, chosen, rejected) as messages; strings become one user and one assistant turn.

        Raises:
            SimPOError: the pair is a conversation but there is no template to write it with.
        """
        if self.plain and not isinstance(pair.prompt, str):
            raise SimPOError(
                f"{pair.source} is a conversation, and the chat template is {self.origin}; set "
                "data.chat_template to a template file, or give records whose prompt, chosen and "
                "rejected are strings"
            )
        return (
            as_messages(pair.prompt, "user"),
            as_messages(pair.chosen, "assistant"),
            as_messages(pair.rejected, "assistant"),
        )

    def render(
        self, messages: list[Message], tools: list | None = None, *, generation: bool = False
    ) -> str:
        """The text of a conversation, with the header of the next answer if ``generation``.

        Raises:
            Refused: the template refuses this conversation.
        """
        options = self._options if tools is None else {**self._options, "tools": tools}
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, **options
            )
        except TEMPLATE_ERRORS as error:
            raise InvalidRecordError("the chat template refuses it", one_line(error)) from None


def read_template(given: str) -> tuple[str, str]:
    """(template text, where it came from) of a file's name or a template's own text."""
    if "{%" in given or "{{" in given:
        return given, "the text given in data.chat_template"
    try:
        return local_path(given).read_text(encoding="utf-8"), f"the file {given}"
    except (OSError, ValueError, SimPOError) as error:
        raise SimPOError(
            f"data.chat_template is {given!r}; it must be auto, none, a readable template file or "
            f"Jinja text ({error})"
        ) from None


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of ``text``, no special ones added.

    Raises:
        Refused: it is no valid text (JSON can hold half of a surrogate pair).
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRecordError("no valid text", error.reason) from None
    return tokenizer.encode(text, add_special_tokens=False)
