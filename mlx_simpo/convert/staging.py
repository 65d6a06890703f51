"""Output folders that appear complete or not at all."""

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
    """Yield a scratch folder that becomes ``output`` when the block ends, in one step.

    If anything fails, the scratch folder and the parents created for it are removed.

    Raises:
        SimPOError: ``output`` exists and is not an empty folder, or cannot be written.
    """
    check_output_free(str(output))
    path = local_path(output)
    new_parents = [parent for parent in path.parents if not parent.exists()]
    scratch = None
    try:
        # In the same folder as the output: a rename is atomic only within one file system.
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:40]}-"))
        yield scratch
        # mkdtemp creates folders that only their owner can read; the output is an ordinary one.
        os.chmod(scratch, 0o777 & ~current_umask())
        os.replace(scratch, path)  # also replaces an empty folder
        new_parents = []
    except OSError as error:
        raise SimPOError(f"output is {str(output)!r}; it cannot be written: {error}") from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for parent in new_parents:  # innermost first
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def current_umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
