"""Names of local files and folders as users write them, and the folder of the user's cache."""

import os
from pathlib import Path

from .errors import SimPOError


def local_path(name: str | Path) -> Path:
    """Return ``name`` as a path, with ~ expanded to the home folder; it need not exist.

    Raises:
        SimPOError: the name is empty, too long, holds a NUL, or starts with an unknown user's ~.
    """
    try:
        if "\0" in str(name):
            raise ValueError("it has a NUL in it")
        path = Path(name).expanduser()
        path.exists()  # asks the system, which knows what is too long
    except (OSError, RuntimeError, ValueError) as error:
        raise SimPOError(f"not a valid path: {str(name)!r} ({error})") from None
    if not str(name):
        raise SimPOError("not a valid path: '' (the name is empty)")
    return path


def cache_folder() -> Path:
    """Return the folder for files that can be recreated; it need not exist.

    It is $MLX_SIMPO_CACHE, or mlx_simpo in the user's cache folder.

    Raises:
        RuntimeError: the user has no home folder, and neither variable is set.
    """
    folder = os.environ.get("MLX_SIMPO_CACHE")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_simpo"
