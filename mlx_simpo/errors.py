"""The one exception that user input can cause."""


class SimPOError(Exception):
    """Something the user can mend: the message gives the value, the rule and the remedy.

    The command line prints it as one line on stderr and exits with status 2; anything else that is
    raised is a defect of this package.
    """
