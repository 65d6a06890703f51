"""Counts what the project's rules about its own code are about, for tests and for people.

    python tests/house_rules.py            # the counts
    python tests/house_rules.py --list     # and every place that breaks a rule
    python tests/house_rules.py --list mlx_simpo/engine tests/engine

The rules: one word per idea (WORDS and PHRASES below say which words are not used, and for what);
a function that raises says so; nothing is written twice; modules stay short; comments give reasons.
"""

import ast
import io
import re
import sys
import tokenize
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mlx_simpo"
FOLDERS = ("mlx_simpo", "tests", "benchmarks", "examples")
MAX_LINES = 300
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
# Phrases that docstrings, comments and messages do not use.
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
# Where a word has its ordinary meaning: file (or "" for any) → words or phrases allowed there.
# Each is the name of somebody else's thing, or English that no other word serves.
ALLOWED: dict[str, set[str]] = {
    "": set(),
    # TokenizedSequence.num_scored: the word itself, as WORDS recommends.
    "mlx_simpo/data/encode.py": {"scored"},
    "tests/house_rules.py": {*WORDS, *PHRASES},
    # The text that the tests' tokenizer is trained on; other words would be other tokens.
    "tests/helpers/tiny.py": {r"\banswers?\b"},
}


class Place(NamedTuple):
    """Where a rule is broken, and how."""

    path: str
    line: int
    what: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what}"


def sources(folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    """The Python files in these folders (or these files), without what tests execute as data."""
    files: list[Path] = []
    for folder in folders:
        path = ROOT / folder
        files += [path] if path.is_file() else sorted(path.rglob("*.py"))
    return files


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_allowed(path: Path, word: str) -> bool:
    return word in ALLOWED[""] or word in ALLOWED.get(named(path), set())


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every name that this file itself introduces: variables, arguments, functions, classes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


def parts(name: str) -> list[str]:
    """The words of an identifier: of_queries → of, queries; LoRADelta → lo, ra, delta."""
    return re.findall(r"[a-z]+|[A-Z][a-z]*", name)


def word_breaks(path: Path) -> list[Place]:
    """Identifiers with a word that another word stands for. Names of tests are sentences and are
    held to PHRASES alone."""
    found = []
    for line, name in sorted(set(identifiers(ast.parse(path.read_text("utf-8"))))):
        if name.startswith("test_"):
            continue
        broken = [w.lower() for w in parts(name) if w.lower() in WORDS]
        found += [
            Place(named(path), line, f"{name} (say {WORDS[w]})")
            for w in broken
            if not is_allowed(path, w)
        ]
        if name.startswith("of_"):
            found.append(Place(named(path), line, f"{name} (a noun, d_… for gradients)"))
    return found


def texts(source: str) -> Iterator[tuple[int, str]]:
    """Every string and comment of a file, with its line."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("COMMENT", "STRING", "FSTRING_MIDDLE"):
            yield token.start[0], token.string


def phrase_breaks(path: Path) -> list[Place]:
    """Docstrings, comments and messages with a phrase that another one stands for."""
    found = []
    for line, text in texts(path.read_text("utf-8")):
        for pattern, better in PHRASES.items():
            for match in re.finditer(pattern, text.replace("\n", " "), re.IGNORECASE):
                if not is_allowed(path, pattern):
                    at = line + text[: match.start()].count("\n")
                    found.append(Place(named(path), at, f"“{match[0]}” (say {better})"))
    return found


def own_raises(function: ast.AST) -> Iterator[ast.Raise]:
    """The raise statements of a function itself, not those of functions within it."""
    for child in ast.iter_child_nodes(function):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(child, ast.Raise) and child.exc is not None:
            yield child
        yield from own_raises(child)


def silent_raises(path: Path) -> list[Place]:
    """Functions of the package that raise and whose docstring does not say what."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.FunctionDef) or not any(own_raises(node)):
            continue
        text = ast.get_docstring(node) or ""
        if not re.search(r"Raises:|\b\w*(Error|Exit|Interrupt)\b", text):
            found.append(Place(named(path), node.lineno, f"{node.name} raises and does not say so"))
    return found


def code_lines(path: Path) -> list[tuple[int, str]]:
    """(number, text without white space) of the lines that are code, imports aside."""
    numbered = enumerate(path.read_text("utf-8").splitlines(), 1)
    lines = [(number, "".join(line.split())) for number, line in numbered]
    return [(n, t) for n, t in lines if len(t) > 3 and not t.startswith(("#", "import", "from"))]


def repeated(files: list[Path]) -> list[Place]:
    """Code lines that belong to a run of RUN or more which is elsewhere, too."""
    runs: dict[tuple[str, ...], list[tuple[Path, int]]] = defaultdict(list)
    lines = {path: code_lines(path) for path in files}
    for path, content in lines.items():
        for first in range(len(content) - RUN + 1):
            runs[tuple(text for _, text in content[first : first + RUN])].append((path, first))
    twice = {
        (path, lines[path][first + offset][0])
        for at in runs.values()
        if len(at) > 1
        for path, first in at
        for offset in range(RUN)
    }
    return [Place(named(path), number, "repeated") for path, number in sorted(twice)]


def comment_share(files: list[Path]) -> float:
    """Lines that are a comment, or end in one, among all lines that are not empty."""
    comments = lines = 0
    for path in files:
        source = path.read_text("utf-8")
        lines += sum(1 for line in source.splitlines() if line.strip())
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments += sum(1 for token in tokens if token.type == tokenize.COMMENT)
    return comments / lines


def long_modules(files: list[Path]) -> list[Place]:
    sizes = [(path, len(path.read_text("utf-8").splitlines())) for path in files]
    return [Place(named(p), n, f"{n} lines") for p, n in sizes if n > MAX_LINES]


def main(arguments: list[str]) -> None:
    folders = tuple(a for a in arguments if not a.startswith("-")) or FOLDERS
    files = sources(folders)
    package = [path for path in files if PACKAGE in path.parents]
    rules = {
        "words that another word stands for": [b for f in files for b in word_breaks(f)],
        "phrases that another phrase stands for": [b for f in files for b in phrase_breaks(f)],
        "functions that raise and do not say so": [b for f in package for b in silent_raises(f)],
        f"modules over {MAX_LINES} lines": long_modules(package),
    }
    for rule, breaks in rules.items():
        print(f"{rule}: {len(breaks)}")
        if "--list" in arguments:
            print(*(f"  {place}" for place in breaks), sep="\n")
    if package:
        lines = sum(len(code_lines(path)) for path in package)
        twice = repeated(package)
        print(f"repeated lines of the package: {len(twice)} of {lines}, {len(twice) / lines:.1%}")
        if "--list" in arguments:
            print(*(f"  {place}" for place in twice), sep="\n")
        print(f"comments: {comment_share(package):.1%} of the package's lines")


if __name__ == "__main__":
    main(sys.argv[1:])
