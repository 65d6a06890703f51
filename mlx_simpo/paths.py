"""Names of local files and folders as users write them."""

from pathlib import Path

from .errors import SimPOError


def local_path(name: str | Path) -> Path:
    """``name`` as a path, ~ standing for the home folder; it need not exist.

    Raises:
        SimPOError: nothing of that name can exist: it is empty, too long, or an unknown user's.
    """
    try:
        if "\0" in str(name):
            raise ValueError("it has a NUL in it")
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise SimPOError(f"no such file or folder can be: {str(name)!r} ({error})") from None
    if not str(name):
        raise SimPOError("no such file or folder can be: '' (the name is empty)")
    return path
