"""The one exception that user input can cause, and what text must not show: tokens, controls."""

import os
import re
from collections.abc import Sequence

# A token of the Hugging Face Hub, and what stands before the host in an address: user:password@.
_SECRETS = re.compile(r"hf_(?:oauth_[\w.-]+|[A-Za-z0-9]{20,})|(?<=://)[^\s/@'\"]+(?=@)")
# Libraries that send a token may repeat the whole header in a message.
_HEADER = re.compile(r"Bearer\s+[^\s'\"]+")
_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_MIN_TOKEN = 8  # characters; a shorter variable is a mistake, and its text may be an ordinary word


# What a terminal acts on, without tabs and line breaks; and halves of characters, which it cannot
# show.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


class SimPOError(Exception):
    """Something the user can fix: the message gives the value, the rule and what to do.

    The command line prints it as one line on stderr and exits with status 2; anything else that is
    raised is a defect of this package. Tokens and passwords in the message are replaced by "…":
    messages end in logs and in reports of bugs.
    """

    def __init__(self, message: object) -> None:
        super().__init__(redacted(str(message)))


class InvalidSettingsError(SimPOError):
    """Several mistakes in the settings, told at once.

    messages: one sentence per mistake. The command line prints each on a line of its own.
    """

    def __init__(self, messages: Sequence[str]) -> None:
        super().__init__("\n".join(messages))
        self.messages = tuple(map(redacted, messages))


def messages_of(error: SimPOError) -> tuple[str, ...]:
    """Return the mistakes that an error tells, one message each."""
    return error.messages if isinstance(error, InvalidSettingsError) else (str(error),)


def one_line(error: object, limit: int | None = None) -> str:
    """Return the text of an error on one line, cut to ``limit`` characters.

    Messages of other libraries span lines, and some list every weight of a model.
    """
    text = " ".join(str(error).split())
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"


def visible(text: str) -> str:
    """Return text with escapes in place of control characters, tabs and line breaks excepted.

    Text of records and responses may hold anything, and a terminal acts on escape sequences: they
    move the cursor over other lines, or write to the clipboard.
    """
    return _CONTROLS.sub(lambda match: repr(match[0])[1:-1], text)


def redacted(text: str) -> str:
    """Return text with "…" in place of Hub tokens, passwords in addresses and the user's token."""
    return _HEADER.sub("…", _without_secrets(text))


def has_secret(text: str) -> bool:
    """Return whether text holds a Hub token, a password in an address, or the user's own token."""
    return _without_secrets(text) != text


def _without_secrets(text: str) -> str:
    for name in _TOKEN_VARIABLES:
        value = os.environ.get(name, "").strip()
        if len(value) >= _MIN_TOKEN:
            text = text.replace(value, "…")
    return _SECRETS.sub("…", text)
