"""The one exception that user input can cause, and how any error's text becomes one line."""


class SimPOError(Exception):
    """Something the user can fix: the message gives the value, the rule and what to do.

    The command line prints it as one line on stderr and exits with status 2; anything else that is
    raised is a defect of this package.
    """


def one_line(error: object, limit: int | None = None) -> str:
    """Return the text of an error on one line, cut to ``limit`` characters.

    Messages of other libraries span lines, and some list every weight of a model.
    """
    text = " ".join(str(error).split())
    return text if limit is None or len(text) <= limit else text[: limit - 1] + "…"
