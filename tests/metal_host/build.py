"""Metal text to a Linux library: what g++ is told, how it compiles it, and where that is kept."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from .signature import Parameter, Signature

HERE = Path(__file__).parent
RUNTIME = [HERE / n for n in ("runtime.cpp", "threads.h", "memory.h", "report.h", "host.h")]
HEADERS = [HERE / n for n in ("msl.h", "types.h", "simd.h", "host.h")]

OLDEST_COMPILER = 12  # the first that knows _Float16 and can mark variables that were never set
RUNTIME_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-exceptions"]
KERNEL_FLAGS = [
    "-std=gnu++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-O1",
    "-g",
    # Every access outside of a thread's own variables calls the runtime, and undefined behaviour
    # does. A loop that g++ made into one memset would be one access.
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,alignment,null,shift,integer-divide-by-zero,signed-integer-overflow,bool",
    "-fno-sanitize-recover=all",
    "-fno-tree-loop-distribute-patterns",
    # A variable that was never set has a value that shows.
    "-ftrivial-auto-var-init=pattern",
    # Metal has no double, exceptions or type information.
    "-fsingle-precision-constant",
    "-fno-exceptions",
    "-fno-rtti",
    "-fno-threadsafe-statics",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-w",
]

# msl.h stands for all of them.
INCLUDES = re.compile(r"^[ \t]*#[ \t]*(include[ \t]*<metal_\w+>|pragma[ \t]+once).*", re.MULTILINE)
# threadgroup float a[32], b[2][8]; a pointer has a star, which matches nowhere here.
THREADGROUP_ARRAYS = re.compile(
    r"""\bthreadgroup \s+
    (?P<type> [A-Za-z_][\w:]* (?: \s* <[^;(){}]*?> )? ) \s+
    (?P<arrays> [A-Za-z_]\w* \s* (?: \[[^]]*\] \s* )*
             (?: , \s* [A-Za-z_]\w* \s* (?: \[[^]]*\] \s* )* )* )
    ;""",
    re.VERBOSE,
)
# Any other way to declare one: g++ would make it a variable of each thread.
STRAY = re.compile(r"\bthreadgroup\s+[A-Za-z_][\w:]*(\s*<[^;(){}]*?>)?\s+[A-Za-z_]\w*\s*[\[=;,]")


class MetalError(RuntimeError):
    """A kernel that does not compile, or whose execution is not as it should be.

    ``kinds`` are the kinds of what was found, such as "race" or "out-of-bounds".
    """

    def __init__(self, kernel: str, problems: list[tuple[str, str]]) -> None:
        self.kinds = {kind for kind, _ in problems}
        lines = [f"[{kind}] {message}" for kind, message in problems]
        super().__init__("\n  ".join([f"kernel {kernel!r}:", *lines]))


@cache
def _said_by(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def missing() -> str | None:
    """Why no kernel can be executed on this machine, or None."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "the Metal host needs Linux on x86-64"
    if not shutil.which("g++"):
        return f"the Metal host needs g++ {OLDEST_COMPILER}, which is not installed"
    version = _said_by("g++", "-dumpversion").strip()
    is_new = int(version.split(".")[0]) >= OLDEST_COMPILER
    return None if is_new else f"the Metal host needs g++ {OLDEST_COMPILER}, not {version}"


def _declare_arrays(match: re.Match[str]) -> str:
    arrays = [
        re.fullmatch(r"\s*(\w+)\s*(.*?)\s*", a, re.DOTALL) for a in match["arrays"].split(",")
    ]
    declared = [f"MSL_THREADGROUP({a[1]}, {match['type']}{a[2]});" for a in arrays if a]
    return " ".join(declared) + "\n" * match[0].count("\n")


def _argument(position: int, parameter: Parameter) -> str:
    """What the function is given for a parameter, of ``buffers`` and ``thread``."""
    if parameter.kind == "attribute":
        value = f"thread_.{parameter.name}"
        return f"uint3({value}.x, {value}.y, {value}.z)" if parameter.type == "uint3" else value
    pointer = parameter.type.replace("&", "*")
    return ("*" if "&" in parameter.type else "") + f"({pointer})buffers[{position}]"


def host_text(signature: Signature, source: str, header: str) -> str:
    """The C++ for g++. Lines keep their numbers, in files called "header" and "source"."""
    header = INCLUDES.sub("", header)
    body = THREADGROUP_ARRAYS.sub(_declare_arrays, source)
    for file, text in {"header": header, "source": body}.items():
        if found := STRAY.search(text):
            where = f"{file}:{text.count(chr(10), 0, found.start()) + 1}"
            problem = f"{where}: threadgroup variables are a kernel's own and have no initial value"
            raise MetalError(signature.name, [("compile", problem)])
    arguments = [_argument(i, p) for i, p in enumerate(signature.parameters)]
    return f"""#include "msl.h"
#line 1 "header"
{header}
#line 1 "signature"
{signature.declaration}
#line 1 "source"
{body}
}}
MSL_UNCHECKED void metal_host::call_kernel(void* const* buffers, const Attributes& thread_) {{
  {signature.name}{signature.arguments}({", ".join(arguments)});
}}
"""


def _cache_folder() -> Path:
    """This user's own: a library in a folder that others can write to must not be loaded."""
    folder = Path(tempfile.gettempdir()) / f"metal_host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if state.st_uid != os.getuid() or state.st_mode & 0o077 or folder.is_symlink():
        raise PermissionError(f"{folder} is open to others: remove it")
    return folder


def _kept(name: str, suffix: str, *parts: str) -> Path:
    """The file for what is compiled from the parts: another one if any of them has changed."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    readable = re.sub(r"\W", "", name)[:40]
    return _cache_folder() / f"{readable}-{digest}{suffix}"


def _compile(kernel: str, output: Path, arguments: list[str], text: str | None = None) -> None:
    """Runs g++ and puts its output in its place at once, for other processes may want it too."""
    fresh = output.with_name(f"{os.getpid()}-{output.name}")
    command = ["g++", *arguments, "-o", str(fresh)]
    ran = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise MetalError(kernel, [("compile", ran.stderr)])
    fresh.replace(output)


@cache
def _runtime() -> Path:
    texts = [path.read_text(encoding="utf-8") for path in RUNTIME]
    built = _kept("runtime", ".o", *texts, *RUNTIME_FLAGS, _said_by("g++", "--version"))
    if not built.exists():
        _compile("runtime", built, [*RUNTIME_FLAGS, "-c", str(RUNTIME[0])])
    return built


@cache
def library(name: str, text: str) -> Path:
    """The library made of a kernel's C++ text and the runtime."""
    runtime = _runtime()
    headers = [path.read_text(encoding="utf-8") for path in HEADERS]
    built = _kept(name, ".so", text, *headers, *KERNEL_FLAGS, runtime.name)
    if not built.exists():
        # "none": the runtime is no C++ text. The libraries are named for else g++ would add the
        # sanitizer's own.
        inputs = [f"-I{HERE}", "-x", "c++", "-", "-x", "none", str(runtime)]
        link = ["-shared", "-Wl,-Bsymbolic,--no-undefined"]
        libraries = ["-nodefaultlibs", "-lstdc++", "-lm", "-lc", "-lgcc"]
        _compile(name, built, [*KERNEL_FLAGS, *inputs, *link, *libraries], text)
    return built


def line_of(library: Path, offset: int) -> str:
    """Where an instruction comes from: "header:12, from source:3" if a function was inlined."""
    found = _said_by("addr2line", "-i", "-e", str(library), hex(offset)).split("\n")
    places = [re.sub(r" \(.*", "", Path(place).name) for place in found if place]
    ours = [place for place in places if not place.startswith("msl.h")]
    return ", from ".join(ours or places)
