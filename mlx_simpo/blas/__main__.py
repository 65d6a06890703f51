"""``python -m mlx_simpo.blas``: the environment in which another program gets OpenBLAS.

    env $(python -m mlx_simpo.blas) mlx_lm.generate --model …

For programs that do not import mlx_simpo; the variables go to stdout, an explanation to stderr.
"""

import os
import platform
import re
import sys

from . import is_needed, library, missing


def preload_variables() -> tuple[dict[str, str], str]:
    """Return environment variables that load OpenBLAS, and what they do or why there are none."""
    problem, loaded = missing(), library()
    if sys.platform != "linux":
        return {}, f"{platform.system()} needs none: MLX uses the system's own BLAS"
    if not is_needed():
        return {}, "MLX has its CUDA back end here"
    if problem is not None:
        return {}, f"no OpenBLAS, MLX will be up to 80 times slower: {problem}"
    if loaded is None:
        return {}, "OpenBLAS is loaded already"
    variables = {"LD_PRELOAD": _search_path(loaded.file, "LD_PRELOAD")}
    if loaded.fortran is not None:
        variables["LD_LIBRARY_PATH"] = _search_path(str(loaded.fortran), "LD_LIBRARY_PATH")
    for path in (loaded.file, loaded.fortran):
        if path is not None and re.search(r"[\s:]", str(path)):
            return {}, f"{path} has a space or colon in it, which LD_PRELOAD cannot hold"
    return variables, f"OpenBLAS from {loaded.file}"


def _search_path(path: str, variable: str) -> str:
    """Return ``path`` in front of what ``variable`` already holds."""
    return ":".join(filter(None, [path, os.environ.get(variable)]))


def main() -> None:
    """Print the variables, as arguments of `env`, and what they do."""
    variables, reason = preload_variables()
    sys.stderr.write(f"mlx-simpo: {reason}\n")
    sys.stdout.write(" ".join(f"{name}={value}" for name, value in variables.items()) + "\n")


if __name__ == "__main__":
    main()
