"""``mlx-simpo`` and ``python -m mlx_simpo``."""

import sys
from io import TextIOWrapper

from .blas import restart_with_openblas


def main() -> None:
    """Run the command line; on a Linux CPU with OpenBLAS loaded before MLX is."""
    restart_with_openblas()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file name may be no text
    from .cli.main import run_command

    sys.exit(run_command(sys.argv[1:]))


if __name__ == "__main__":
    main()
