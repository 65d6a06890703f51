"""Compiles a kernel's Metal text to a Linux library, and caches it."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from .signature import Signature

HERE = Path(__file__).parent
RUNTIME = [HERE / n for n in ("runtime.cpp", "threads.h", "memory.h", "report.h", "host.h")]
HEADERS = [HERE / n for n in ("msl.h", "types.h", "simd.h", "arrays.h", "cuda_host.h", "host.h")]

OLDEST_COMPILER = 12  # the first with _Float16 and -ftrivial-auto-var-init
RUNTIME_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-fno-exceptions"]
KERNEL_FLAGS = [
    "-std=gnu++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-O1",
    "-g",
    # Every access outside of a thread's own variables, and undefined behaviour, calls the runtime.
    # A loop that g++ turns into one memset would count as one access.
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    "-fsanitize=bounds,alignment,null,shift,integer-divide-by-zero,signed-integer-overflow,bool",
    "-fno-sanitize-recover=all",
    "-fno-tree-loop-distribute-patterns",
    # Variables that are never set get a value that shows in the results.
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

# msl.h takes the place of all of them.
INCLUDES = re.compile(r"^[ \t]*#[ \t]*(include[ \t]*<metal_\w+>|pragma[ \t]+once).*", re.MULTILINE)
# threadgroup float a[32], b[2][8]; but not a pointer: nothing here matches its star.
THREADGROUP_ARRAYS = re.compile(
    r"""\b(?:threadgroup|__shared__) \s+
    (?P<type> [A-Za-z_][\w:]* (?: \s* <[^;(){}]*?> )? ) \s+
    (?P<arrays> [A-Za-z_]\w* \s* (?: \[[^]]*\] \s* )*
             (?: , \s* [A-Za-z_]\w* \s* (?: \[[^]]*\] \s* )* )* )
    ;""",
    re.VERBOSE,
)
# Any other declaration of one: g++ would make it a variable of each thread.
STRAY = re.compile(
    r"\b(?:threadgroup|__shared__)\s+[A-Za-z_][\w:]*(\s*<[^;(){}]*?>)?\s+[A-Za-z_]\w*\s*[\[=;,]"
)
# The function between the runtime and the kernel.
CALL_KERNEL = (
    "MSL_UNCHECKED void metal_host::call_kernel(void* const* buffers, const Attributes& thread_)"
)


class MetalError(RuntimeError):
    """A kernel does not compile, or a check of its execution has failed.

    ``kinds`` are the kinds of its problems, such as "race" or "out-of-bounds".
    """

    def __init__(self, kernel: str, problems: list[tuple[str, str]]) -> None:
        self.kinds = {kind for kind, _ in problems}
        lines = [f"[{kind}] {message}" for kind, message in problems]
        super().__init__("\n  ".join([f"kernel {kernel!r}:", *lines]))


@cache
def _output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def missing() -> str | None:
    """Return why kernels cannot be executed on this machine, or None if they can."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return "the Metal host needs Linux on x86-64"
    if not shutil.which("g++"):
        return f"the Metal host needs g++ {OLDEST_COMPILER}, which is not installed"
    version = _output_of("g++", "-dumpversion").strip()
    is_new = int(version.split(".")[0]) >= OLDEST_COMPILER
    return None if is_new else f"the Metal host needs g++ {OLDEST_COMPILER}, not {version}"


def _declare_arrays(match: re.Match[str]) -> str:
    arrays = [
        re.fullmatch(r"\s*(\w+)\s*(.*?)\s*", a, re.DOTALL) for a in match["arrays"].split(",")
    ]
    declarations = [f"MSL_THREADGROUP({a[1]}, {match['type']}{a[2]});" for a in arrays if a]
    return " ".join(declarations) + "\n" * match[0].count("\n")


def host_text(signature: Signature, source: str, header: str) -> str:
    """Return the C++ text for g++. Lines keep their numbers, in files called "header" and "source".

    Raises:
        MetalError: a threadgroup variable is declared where Metal does not allow it.
    """
    header = INCLUDES.sub("", header)
    body = THREADGROUP_ARRAYS.sub(_declare_arrays, source)
    for file, text in {"header": header, "source": body}.items():
        if stray := STRAY.search(text):
            where = f"{file}:{text.count(chr(10), 0, stray.start()) + 1}"
            problem = f"{where}: threadgroup variables belong in the kernel, without initial values"
            raise MetalError(signature.name, [("compile", problem)])
    arguments = [signature.argument(i, p) for i, p in enumerate(signature.parameters)]
    return f"""#include "{signature.library}"
#line 1 "header"
{header}
#line 1 "signature"
{signature.declaration}
#line 1 "source"
{body}
{signature.closing}
{CALL_KERNEL} {{
  {signature.name}{signature.arguments}({", ".join(arguments)});
}}
"""


def _cache_folder() -> Path:
    """Return this user's own folder: no library may be loaded from one that others can write to.

    Raises:
        PermissionError: other users can write to the folder.
    """
    folder = Path(tempfile.gettempdir()) / f"metal_host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    if state.st_uid != os.getuid() or state.st_mode & 0o077 or folder.is_symlink():
        raise PermissionError(f"other users can access {folder}: remove it and try again")
    return folder


def _cached_file(name: str, suffix: str, *parts: str) -> Path:
    """Return the path for what is compiled from ``parts``, which differs if any of them does."""
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    readable = re.sub(r"\W", "", name)[:40]
    return _cache_folder() / f"{readable}-{digest}{suffix}"


def _compile(kernel: str, output: Path, arguments: list[str], text: str | None = None) -> None:
    """Run g++ and move its output into place in one step, since other processes may look for it.

    Raises:
        MetalError: the text does not compile.
    """
    fresh = output.with_name(f"{os.getpid()}-{output.name}")
    command = ["g++", *arguments, "-o", str(fresh)]
    process = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if process.returncode:
        raise MetalError(kernel, [("compile", process.stderr)])
    fresh.replace(output)


@cache
def _runtime() -> Path:
    texts = [path.read_text(encoding="utf-8") for path in RUNTIME]
    built = _cached_file("runtime", ".o", *texts, *RUNTIME_FLAGS, _output_of("g++", "--version"))
    if not built.exists():
        _compile("runtime", built, [*RUNTIME_FLAGS, "-c", str(RUNTIME[0])])
    return built


@cache
def library(name: str, text: str) -> Path:
    """Return the library that is linked from a kernel's C++ text and the runtime."""
    runtime = _runtime()
    headers = [path.read_text(encoding="utf-8") for path in HEADERS]
    built = _cached_file(name, ".so", text, *headers, *KERNEL_FLAGS, runtime.name)
    if not built.exists():
        # "-x none", as the runtime is an object file. The libraries are listed so that g++ does not
        # add those of the sanitizer.
        inputs = [f"-I{HERE}", "-x", "c++", "-", "-x", "none", str(runtime)]
        link = ["-shared", "-Wl,-Bsymbolic,--no-undefined"]
        libraries = ["-nodefaultlibs", "-lstdc++", "-lm", "-lc", "-lgcc"]
        _compile(name, built, [*KERNEL_FLAGS, *inputs, *link, *libraries], text)
    return built


def line_of(library: Path, offset: int) -> str:
    """Return the line of an instruction; "header:12, from source:3" if a call was inlined."""
    lines = _output_of("addr2line", "-i", "-e", str(library), hex(offset)).split("\n")
    lines = [re.sub(r" \(.*", "", Path(line).name) for line in lines if line]
    in_kernel = [line for line in lines if not line.startswith("msl.h")]
    return ", from ".join(in_kernel or lines)
