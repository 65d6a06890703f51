"""An output folder that appears whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import SimPOError
from ..paths import local_path
from ..runs.folder import check_output_free


@contextmanager
def staged(output: str | Path) -> Iterator[Path]:
    """A new folder beside ``output`` that takes its place at the end; removed if anything fails.

    Raises:
        SimPOError: ``output`` exists and is not an empty folder, or cannot be written.
    """
    check_output_free(str(output))
    path = local_path(output)
    made = [parent for parent in path.parents if not parent.exists()]
    scratch = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:40]}-"))
        yield scratch
        # mkdtemp makes folders for the owner alone; the result is an ordinary one.
        os.chmod(scratch, 0o777 & ~current_umask())
        os.replace(scratch, path)  # takes the place of an empty folder, too
        made = []
    except OSError as error:
        raise SimPOError(f"output is {str(output)!r}; it cannot be written: {error}") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
