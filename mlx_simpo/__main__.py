"""``mlx-simpo`` and ``python -m mlx_simpo``."""

import sys
from io import TextIOWrapper

from .cli.interrupt import exit_on_interrupt


def main() -> None:
    """Run the command line and exit with its status."""
    with exit_on_interrupt():
        if isinstance(sys.stdout, TextIOWrapper):
            # A file name may hold bytes that are not text.
            sys.stdout.reconfigure(errors="backslashreplace")
        from .cli.main import run_command

    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
