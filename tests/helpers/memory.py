"""Folders in memory, for tests that write thousands of files: on a disk each takes milliseconds."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

MEMORY = "/dev/shm"


@contextmanager
def memory_folder() -> Iterator[Path]:
    """Yield an empty folder, in memory where the system has a place for that, else on the disk."""
    with TemporaryDirectory(dir=MEMORY if os.access(MEMORY, os.W_OK) else None) as folder:
        yield Path(folder).resolve()
