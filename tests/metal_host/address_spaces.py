"""Checks device, threadgroup and constant, which g++ does not know, with clang if installed."""

import re
import shutil
import subprocess
from functools import cache

from .build import HERE, host_text
from .signature import Signature

CLANGS = ["clang++", *(f"clang++-{version}" for version in range(30, 18, -1))]
FLAGS = ["-fsyntax-only", "-x", "c++", "-std=gnu++17", "-DMSL_ADDRESS_SPACES"]
FLAGS += ["-Wno-everything", "-Wno-reserved-user-defined-literal", "-ferror-limit=8", f"-I{HERE}"]
# float4(…) or vec<T, 4>(…), not float4 f(…) or a.float4(…).
CONSTRUCTORS = re.compile(
    r"""(?<![\w.])
    ( (?:metal::)?
      (?: (?:float|half|bfloat|bool|u?char|u?short|u?int|u?long)[234] | vec<[^<>;()]*> ) )
    \s* \( (?=[^)])""",
    re.VERBOSE,
)


@cache
def clang() -> str | None:
    """Return the name of a clang++ of version 19 or newer, or None."""
    for name in filter(shutil.which, CLANGS):
        process = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
        version = re.search(r"version (\d+)", process.stdout)
        if version and int(version[1]) >= 19:
            return name
    return None


def address_spaces(kernel_signature: Signature, source: str, header: str = "") -> str:
    """Return clang's errors about the pointers of a kernel with that signature, or an empty string.

    Inputs under eight elements are ``constant``, so check signatures for both sizes.

    Raises:
        RuntimeError: there is no clang++ 19 or newer.
    """
    compiler = clang()
    if compiler is None:
        raise RuntimeError("checking address spaces needs clang++ 19 or newer; install it")
    text = CONSTRUCTORS.sub(r"msl_make<\1>(", host_text(kernel_signature, source, header))
    process = subprocess.run(
        [compiler, *FLAGS, "-"], input=text, capture_output=True, text=True, check=False
    )
    return process.stderr if process.returncode else ""
