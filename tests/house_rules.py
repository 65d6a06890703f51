"""Measures how well the code keeps the project's rules about itself, for the tests and for people.

    python tests/house_rules.py                                # how often each rule is broken
    python tests/house_rules.py --list                         # and where
    python tests/house_rules.py --list mlx_simpo/engine tests/engine

The rules: one word per idea (WORDS and PHRASES list the words that are not used, and what to say
instead); a function that raises says so in its docstring; nothing is written twice; modules are
short; comments give reasons. The exit status is 1 if a rule is broken.
"""

import argparse
import ast
import bisect
import io
import re
import tokenize
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlx_simpo"
FOLDERS = ("mlx_simpo", "tests", "benchmarks", "examples")
MAX_LINES = 300  # of a module
RUN = 6  # equal lines in a row that count as repeated

# Parts of identifiers (between underscores) that are not used, and what to say instead.
WORDS = {
    "given": "primals, inputs, values, …",
    "slope": "cotangent, gradient, d_out",
    "slopes": "cotangents, d_out",
    "made": "outputs, the thing itself",
    "kept": "saved_…, the thing itself",
    "found": "result, actual, the thing itself",
    "place": "index, position, path",
    "places": "indices, positions",
    "owner": "…_index",
    "owners": "…_indices",
    "wanted": "expected, required",
    "judged": "checked, compared",
    "proved": "checked, verified",
    "said": "message, the thing itself",
    "answer": "response",
    "answers": "responses",
    "scored": "num_scored, is_scored, loss_mask",
    "refuse": "reject, check, raise_…",
    "refused": "quarantined, rejected",
    "unusable": "quarantined",
    "mend": "fix",
    "sound": "valid",
}
# Phrases that docstrings, comments and messages do not use, and what to say instead. A space
# stands for white space of any kind, line breaks included.
PHRASES = {
    r"data sets?\b": "dataset",
    r"\b(bare|live) models?\b": "base model, merged model",
    r"\b(un)?mend(s|ed|ing)?\b": "fix",
    r"\b(un)?sound\b": "valid",
    r"\bstands? twice\b": "appears twice",
    r"\bno such file or folder can be\b": "not a valid path",
    r"\bleft out\b": "quarantined, omitted",
    r"\bunusable\b": "quarantined, invalid",
    r"\banswers?\b": "response",
    r"\b(line|row|bar|column|pair|pass|record|file|thread|folder|module|command|bytes|tokens?|nats?)"
    r" an? (axis|batch|chunk|core|evaluation|file|folder|head|key|layer|line|pair|position|record"
    r"|row|run|step|thread|time|token|turn)\b": "per",
}
# Where a word has its ordinary meaning: file (or "" for any) → words or patterns allowed there.
# Each is the name of somebody else's thing, or English that no other word serves.
ALLOWED: dict[str, set[str]] = {
    "": set(),
    # TokenizedSequence.num_scored: the word itself, as WORDS recommends.
    "mlx_simpo/data/encode.py": {"scored"},
    # The text that the tests' tokenizer is trained on; other words would be other tokens.
    "tests/helpers/tiny.py": {r"\banswers?\b"},
    # The tables above, and what the tests of them plant.
    "tests/house_rules.py": set(PHRASES),
    "tests/test_house_rules.py": set(PHRASES),
}
PRAGMAS = re.compile(r"#\s*(type:|noqa|pyright:|ruff:|fmt:)")


class Violation(NamedTuple):
    """A line that breaks a rule, and how."""

    path: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


def python_files(names: Iterable[str] = FOLDERS) -> list[Path]:
    """Return the Python files in these folders, or these files, relative to the project's root.

    Raises:
        FileNotFoundError: no such file or folder.
    """
    files: set[Path] = set()
    for name in names:
        path = ROOT / name
        if not path.exists():
            raise FileNotFoundError(f"{name} is not in {ROOT}")
        files |= {path} if path.is_file() else set(path.rglob("*.py"))
    return sorted(files)


def relative_name(path: Path) -> str:
    """Return a file's name relative to the project's root, if it is in there."""
    return (path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).as_posix()


def is_allowed(path: Path, word: str) -> bool:
    """Return whether ALLOWED lists this word or pattern for this file."""
    return word in ALLOWED[""] or word in ALLOWED.get(relative_name(path), set())


# --- words ------------------------------------------------------------------------------------


def introduced_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, name) for every name that a file introduces: functions, classes, arguments,
    variables, attributes, and what comes after ``as``. Names that are only used do not count."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield node.lineno, name
            case ast.ClassDef(name=name) | ast.arg(arg=name):
                yield node.lineno, name
            case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
                yield node.lineno, name
            case (
                ast.ExceptHandler(name=str(name))
                | ast.MatchAs(name=str(name))
                | ast.MatchStar(name=str(name))
                | ast.alias(asname=str(name))
            ):
                yield node.lineno, name


def words_of(name: str) -> list[str]:
    """Split an identifier into lower-case words: saved_rows → saved, rows; LoRADelta → lo, ra, …"""
    return [word.lower() for word in re.findall(r"[a-z]+|[A-Z][a-z]*", name)]


def word_violations(path: Path) -> list[Violation]:
    """Return the names that use one of WORDS, or that begin with ``of_``.

    Names of tests are sentences; they are read as text, see `phrase_violations`.
    """
    violations = []
    for line, name in sorted(set(introduced_names(ast.parse(path.read_text("utf-8"))))):
        if name.startswith("test_"):
            continue
        hints = [WORDS[w] for w in words_of(name) if w in WORDS and not is_allowed(path, w)]
        if name.startswith("of_"):
            hints.append("a noun, d_… for gradients")
        violations += [Violation(relative_name(path), line, f"{name} (say {h})") for h in hints]
    return violations


# --- phrases ----------------------------------------------------------------------------------


def passages(source: str) -> Iterator[list[tuple[int, str]]]:
    """Yield the texts of a file, each as its lines with their numbers: strings and comments.

    Adjacent strings, which Python joins, and comments on adjacent lines are one text each. The
    expressions in f-strings are code and blanked.
    """
    text: list[tuple[int, str]] = []
    last = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("NL", "FSTRING_START", "FSTRING_END") and last:
            continue
        content = token.string
        if kind == "STRING":
            content = string_content(content)
        elif kind == "COMMENT":
            content = content.lstrip("# ") + " "
        elif kind == "FSTRING_MIDDLE":  # Python 3.12 and later
            kind = "STRING"
        else:
            kind = ""
        if text and kind != last:
            yield text
            text = []
        last = kind
        if kind:
            # A line break within a text is white space; between adjacent strings there is nothing.
            lines = content.replace("\n", " \n").split("\n")
            text += [(token.start[0] + number, line) for number, line in enumerate(lines)]
    if text:
        yield text


def string_content(literal: str) -> str:
    """Return what stands between a string literal's quotes, with white space in the place of
    escaped line breaks and of an f-string's {expressions}."""
    quote = next(q for q in ('"""', "'''", '"', "'") if literal.endswith(q))
    prefix, _, content = literal.removesuffix(quote).partition(quote)
    if "f" in prefix.lower():
        while (shorter := re.sub(r"\{\{|\}\}|\{[^{}]*\}", " ", content)) != content:
            content = shorter
    return content if "r" in prefix.lower() else re.sub(r"\\[nrt]", "  ", content)


def phrase_violations(path: Path) -> list[Violation]:
    """Return the docstrings, comments, messages and names of tests that use one of PHRASES."""
    source = path.read_text("utf-8")
    texts = list(passages(source))
    for line, name in sorted(set(introduced_names(ast.parse(source)))):
        if name.startswith("test_"):
            texts.append([(line, name.replace("_", " "))])
    patterns = [(p, b) for p, b in PHRASES.items() if not is_allowed(path, p)]
    violations = []
    for text in texts:
        starts = [0]
        for _, line in text:
            starts.append(starts[-1] + len(line))
        joined = "".join(line for _, line in text)
        for pattern, better in patterns:
            for match in re.finditer(pattern.replace(" ", r"\s+"), joined, re.IGNORECASE):
                line = text[bisect.bisect_right(starts, match.start()) - 1][0]
                phrase = " ".join(match[0].split())
                violations.append(
                    Violation(relative_name(path), line, f"“{phrase}” (say {better})")
                )
    return sorted(violations)


# --- docstrings -------------------------------------------------------------------------------


def own_raises(function: ast.AST) -> Iterator[ast.Raise]:
    """Yield the raise statements of a function itself, not those of functions and classes in it;
    a bare ``raise`` only passes on what somebody else has raised."""
    for child in ast.iter_child_nodes(function):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(child, ast.Raise) and child.exc is not None:
            yield child
        yield from own_raises(child)


def silent_raises(path: Path) -> list[Violation]:
    """Return the functions that raise and whose docstring names no exception."""
    violations = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node) or ""
        says_so = re.search(r"Raises:|\b\w*(Error|Exit|Interrupt)\b", docstring)
        if any(own_raises(node)) and not says_so:
            what = f"{node.name} raises and its docstring does not say so"
            violations.append(Violation(relative_name(path), node.lineno, what))
    return sorted(violations)


# --- repetition, size, comments ---------------------------------------------------------------


def code_lines(path: Path) -> list[tuple[int, str]]:
    """Return (number, text without white space) of a file's lines, without comments, imports and
    lines of at most three characters."""
    source = path.read_text("utf-8")
    imports: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = [(n, "".join(line.split())) for n, line in enumerate(source.splitlines(), 1)]
    return [(n, t) for n, t in lines if len(t) > 3 and not t.startswith("#") and n not in imports]


def repeated(files: Sequence[Path]) -> list[Violation]:
    """Return every line in a run of at least RUN lines that appears more than once in these files,
    with one of the other positions of that run."""
    lines = {path: code_lines(path) for path in files}
    runs: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    for path, content in lines.items():
        for first in range(len(content) - RUN + 1):
            runs[tuple(text for _, text in content[first : first + RUN])].append((path, first))
    other: dict[tuple[Path, int], str] = {}
    for positions in runs.values():
        if len(positions) == 1:
            continue
        for path, first in positions:
            twin, start = next(p for p in positions if p != (path, first))
            for offset in range(RUN):
                number = lines[path][first + offset][0]
                twin_line = lines[twin][start + offset][0]
                other.setdefault((path, number), f"{relative_name(twin)}:{twin_line}")
    return [
        Violation(relative_name(path), number, f"also at {position}")
        for (path, number), position in sorted(other.items())
    ]


def long_modules(files: Iterable[Path]) -> list[Violation]:
    """Return the files with more than MAX_LINES lines."""
    sizes = [(path, len(path.read_text("utf-8").splitlines())) for path in files]
    return [
        Violation(relative_name(path), MAX_LINES + 1, f"the file has {size} lines")
        for path, size in sizes
        if size > MAX_LINES
    ]


def comment_share(files: Iterable[Path]) -> float:
    """Return the share of lines with a comment among all that are not empty. Instructions to
    linters and type checkers give no reasons and do not count."""
    comments = lines = 0
    for path in files:
        source = path.read_text("utf-8")
        lines += sum(1 for line in source.splitlines() if line.strip())
        comments += sum(
            1
            for token in tokenize.generate_tokens(io.StringIO(source).readline)
            if token.type == tokenize.COMMENT and not PRAGMAS.match(token.string)
        )
    return comments / max(lines, 1)


def violations_by_rule(files: Sequence[Path]) -> dict[str, list[Violation]]:
    """Return the violations in these files by rule. What raises, repeats itself or is long counts
    in the package only; repetitions are looked for in the whole of it."""
    package = [path for path in files if PACKAGE in path.parents]
    names = {relative_name(path) for path in package}
    everywhere = repeated(python_files(["mlx_simpo"])) if package else []
    return {
        "names with a word that is not used": [v for f in files for v in word_violations(f)],
        "texts with a phrase that is not used": [v for f in files for v in phrase_violations(f)],
        "functions that raise and do not say so": [v for f in package for v in silent_raises(f)],
        f"modules of more than {MAX_LINES} lines": long_modules(package),
        "repeated lines": [v for v in everywhere if v.path in names],
    }


def main() -> int:
    """Print how often each rule is broken, and with --list where; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", default=FOLDERS, metavar="PATH", help="default: all")
    parser.add_argument("--list", action="store_true", help="list every violation")
    arguments = parser.parse_args()
    try:
        files = python_files(arguments.paths)
    except FileNotFoundError as error:
        parser.error(str(error))
    rules = violations_by_rule(files)
    for rule, violations in rules.items():
        print(f"{rule}: {len(violations)}")
        if arguments.list:
            for violation in violations:
                print(f"  {violation}")
    if package := [path for path in files if PACKAGE in path.parents]:
        print(f"lines of the package with a comment: {comment_share(package):.1%}")
    return 1 if any(rules.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
