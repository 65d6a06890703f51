"""The check of device, threadgroup and constant, which g++ does not know, by clang where it is."""

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
    """A clang++ of version 19 or newer, or None."""
    for name in filter(shutil.which, CLANGS):
        ran = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
        version = re.search(r"version (\d+)", ran.stdout)
        if version and int(version[1]) >= 19:
            return name
    return None


def address_spaces(described: Signature, source: str, header: str = "") -> str:
    """What clang has to say about pointers of a kernel with that signature: nothing if they are
    right. A kernel's inputs under eight elements are ``constant``, so ask for both sizes."""
    compiler = clang()
    if compiler is None:
        raise RuntimeError("address spaces are checked by clang++ 19 or newer, which is not here")
    text = CONSTRUCTORS.sub(r"msl_make<\1>(", host_text(described, source, header))
    ran = subprocess.run(
        [compiler, *FLAGS, "-"], input=text, capture_output=True, text=True, check=False
    )
    return ran.stderr if ran.returncode else ""
