"""Wrong versions of a kernel's text: C++ for a GPU, which no mutation tool for Python can change.

Each rule replaces one occurrence of a pattern in one line of code. The lines that are more than a
token away are in tests/helpers/kernel_mutants.py.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from .sample import Mutant
from .scope import PACKAGE, ROOT

FOLDER = f"{PACKAGE}/kernels"
# File, and the lines that count: of launch.py those that are the kernel's text.
TEXTS = (
    (f"{FOLDER}/response_logps.metal", "", ""),
    (f"{FOLDER}/cuda.h", "", ""),
    (f"{FOLDER}/launch.py", '_CALL = """', "def backend"),
)
# Pattern and what takes its place.
RULES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("comparison", r" < ", (" <= ", " > ")),
    ("comparison", r" > ", (" >= ", " < ")),
    ("comparison", r" >= ", (" > ", " < ")),
    ("comparison", r" == ", (" != ",)),
    ("logic", r" && ", (" || ",)),
    ("logic", r"(?<=\()!(?=\w)", ("",)),
    ("arithmetic", r" \+ ", (" - ",)),
    ("arithmetic", r" - ", (" + ",)),
    ("arithmetic", r" \* ", (" / ", " + ")),
    ("arithmetic", r" / ", (" * ",)),
    ("arithmetic", r" \+= ", (" = ", " -= ")),
    ("arithmetic", r" \*= ", (" /= ", " = ")),
    ("constant", r"\b0\.0f", ("1.0f",)),
    ("constant", r"\b1\.0f", ("0.0f", "2.0f")),
    ("constant", r"-INFINITY", ("0.0f", "INFINITY", "-100.0f")),
    ("constant", r"\bNAN(?!\S)|\bNAN(?=[;)])", ("0.0f", "INFINITY")),
    ("constant", r"-100", ("-1",)),
    ("constant", r"\b16 /", ("8 /", "32 /")),
    ("constant", r"= 16;", ("= 8;", "= 32;")),
    ("constant", r"(?<=int i )= 0;", ("= 1;",)),
    ("constant", r"== 0\b", ("== 1",)),
    ("constant", r"> 0;", ("> 1;",)),
    ("constant", r"/= 2", ("/= 4",)),
    ("constant", r"\b32\b(?=[\],};])", ("16", "31")),
    ("constant", r"\[32\]", ("[8]",)),
    ("constant", r"0xffffffffu", ("0xffffu", "0u")),
    ("constant", r"\[0\]", ("[1]",)),
    ("constant", r"\[1\]", ("[0]",)),
    ("constant", r"0x7f800000", ("0xff800000", "0x7f7fffff")),
    ("constant", r"0x7fc00000", ("0x7f800000",)),
    ("function", r"simd_max\(", ("simd_min(", "simd_sum(")),
    ("function", r"simd_sum\(", ("simd_max(", "(")),
    ("function", r"metal::max\(", ("metal::min(",)),
    ("function", r"precise::exp\(", ("precise::log(", "precise::tanh(")),
    ("function", r"precise::log\(", ("precise::exp(", "(")),
    ("function", r"precise::tanh\(", ("precise::exp(", "(")),
    ("function", r"::expf\(", ("::tanhf(",)),
    ("function", r"::logf\(", ("::expf(",)),
    ("function", r"::tanhf\(", ("::expf(",)),
    ("function", r"::fmaxf\((?=a|x)", ("-::fmaxf(",)),
    ("name", r"\bmaxima\b", ("sums",)),
    ("name", r"\bsums\b", ("maxima",)),
    ("name", r"\.max_value\b", (".sum",)),
    ("name", r"\.sum\b", (".max_value",)),
    ("name", r"\bscale\b", ("softcap", "1.0f")),
    ("name", r"\bsoftcap\b", ("scale",)),
    ("name", r"position\.index\b", ("position.lane",)),
    ("name", r"position\.count\b", ("position.simdgroups", "position.lane")),
    ("name", r"position\.lane\b", ("position.index", "position.simdgroup")),
    ("name", r"position\.simdgroup\b", ("position.lane",)),
    ("name", r"position\.simdgroups\b", ("position.count", "position.simdgroup")),
    ("name", r"\[target\]", ("[0]",)),
    ("name", r"== target\b", ("== start",)),
    ("name", r"\brow\b(?= =|\)|[,\]])", ("0",)),
    ("name", r"\bthread_index_in_threadgroup\b", ("thread_index_in_simdgroup",)),
    ("name", r"\bthreads_per_threadgroup\.x", ("threads_per_simdgroup",)),
    ("name", r"\bthread_index_in_simdgroup\b", ("simdgroup_index_in_threadgroup",)),
    ("name", r"\bsimdgroup_index_in_threadgroup\b", ("thread_index_in_simdgroup",)),
    ("name", r"\bsimdgroups_per_threadgroup\b", ("threads_per_simdgroup",)),
    ("name", r"threadgroup_position_in_grid\.y", ("threadgroup_position_in_grid.x",)),
    ("name", r"threadIdx\.x", ("threadIdx.y",)),
    ("name", r"blockIdx\.y", ("blockIdx.x",)),
    ("name", r"blockDim\.x", ("blockDim.y",)),
    (
        "barrier",
        r"mem_flags::mem_threadgroup\)",
        ("mem_flags::mem_none)", "mem_flags::mem_device)"),
    ),
    ("barrier", r"metal::threadgroup_barrier", ("metal::simdgroup_barrier",)),
    ("barrier", r"__syncthreads\(\);", ("",)),
    ("cast", r"\bT\((?=0|is)", ("half(", "__half(")),
    ("cast", r"\bfloat\((?=raw_logits)", ("half(", "__half(")),
    ("cast", r"\(device T\*\)", ("(threadgroup T*)", "(constant T*)")),
    ("cast", r"size_t\(row\) \*", ("",)),
    ("address space", r"\bthreadgroup float\*", ("device float*",)),
    ("address space", r"\bdevice (?=float\*|T\*)", ("threadgroup ", "constant ")),
    ("address space", r"constant constexpr", ("device constexpr",)),
    ("condition", r"(?<=if \().+(?=\) \{)", ("true", "false")),
    ("condition", r"(?<== )[^=?;]+(?= \? )", ("true", "false")),
    ("condition", r"(?<=return )[^=?;]+(?= \? )", ("true", "false")),
    ("condition", r"(?<=\()[^()=?;]+==[^()=?;]+(?= \? )", ("true", "false")),
    ("condition", r"(?<=T\()is_token(?= \? )", ("true", "false")),
    ("statement", r"^ +(own|values|max_value|maxima|sums|\*logp|d_raw_logits|x)\b.*;$", ("",)),
    ("statement", r"^ +return;$", ("",)),
    ("statement", r"^ +metal::threadgroup_barrier.*;$", ("",)),
    ("step", r"\+\+([iv])\)", (r"\1 += 2)",)),
)


def mutants() -> Iterator[Mutant]:
    """Yield every wrong version by these rules, and those of tests/helpers/kernel_mutants.py."""
    for file, first, last in TEXTS:
        text = (ROOT / file).read_text(encoding="utf-8")
        lines = text.split("\n")
        begin = text[: text.index(first)].count("\n") if first else 0
        end = text[: text.index(last)].count("\n") if last else len(lines)
        for number in range(begin, end):
            for kind, changed in _changed(lines[number]):
                code = "\n".join((*lines[:number], changed, *lines[number + 1 :]))
                yield Mutant(
                    file, kind, "", number + 1, lines[number].strip(), changed.strip(), code
                )
    yield from _hand_written()


def _changed(line: str) -> Iterator[tuple[str, str]]:
    """Yield the kind and the line for every change of a line of code."""
    code, _, comment = line.partition("  //")
    if code.lstrip().startswith(("//", "#if", "#endif", "#include", "#")):
        return
    seen = {code}
    for kind, pattern, replacements in RULES:
        for match in re.finditer(pattern, code):
            for replacement in replacements:
                changed = code[: match.start()] + match.expand(replacement) + code[match.end() :]
                if changed not in seen:
                    seen.add(changed)
                    yield kind, changed + (f"  //{comment}" if comment else "")


def _hand_written() -> Iterator[Mutant]:
    from helpers.kernel_mutants import MUTANTS

    file = TEXTS[0][0]
    text = Path(ROOT, file).read_text(encoding="utf-8")
    for title, (old, new, _) in MUTANTS.items():
        line = text[: text.index(old)].count("\n") + 1
        yield Mutant(file, title, "", line, old.strip(), new.strip(), text.replace(old, new, 1))
