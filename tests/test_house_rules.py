"""The rules find what is planted, on the right line, and nothing else."""

import subprocess
import sys
from pathlib import Path

import house_rules
import pytest
from house_rules import (
    RUN,
    code_lines,
    comment_share,
    long_modules,
    phrase_violations,
    python_files,
    repeated,
    silent_raises,
    word_violations,
)

RULES = Path(house_rules.__file__)


def write(folder: Path, text: str, name: str = "module.py") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("found = 1", "found"),
        ("def refuse(x): ...", "refuse"),
        ("class FoundRows: ...", "FoundRows"),
        ("f = lambda given: 1", "given"),
        ("def f(*, of_keys): ...", "of_keys"),
        ("self.kept_rows = 1", "kept_rows"),
        ("for place in (): ...", "place"),
        ("import os as owner", "owner"),
        ("with open('x') as made: ...", "made"),
        ("answer: int = 1", "answer"),
        ("(found := 1)", "found"),
    ],
)
def test_names_that_are_not_used(line: str, name: str, tmp_path: Path) -> None:
    path = write(tmp_path, f"self = None\n\n{line}\n")
    violations = word_violations(path)
    assert [(v.line, v.what.split()[0]) for v in violations] == [(3, name)]
    assert str(violations[0]).startswith(f"{path}:3: {name} (say ")


def test_names_after_except_and_case_count(tmp_path: Path) -> None:
    source = "try: ...\nexcept OSError as found: ...\nmatch 1:\n    case [made, *kept]: ...\n"
    lines = [(v.line, v.what.split()[0]) for v in word_violations(write(tmp_path, source))]
    assert lines == [(2, "found"), (4, "kept"), (4, "made")]


@pytest.mark.parametrize(
    "line",
    [
        "from hypothesis import given",
        "record.answer",
        "foundation = replace = 1",
        "print(answer)",
        "def test_what_is_found(): ...",
    ],
)
def test_names_that_are_only_used_or_similar_do_not_count(line: str, tmp_path: Path) -> None:
    assert word_violations(write(tmp_path, line + "\n")) == []


@pytest.mark.parametrize(
    ("source", "line"),
    [
        ("x = 1\n# one data set\n", 2),
        ("x = 1  # one line\n# more of a data\n# set\n", 2),
        ('"""Title.\n\nSeveral data\n    sets.\n"""\n', 3),
        ('raise ValueError(\n    "this data "\n    "set"\n)\n', 2),
        ('x = f"{1}: no Data Set"\n', 1),
        ('x = 1\nx = "one\\nbare model"\n', 2),
        ("x = 1\n\ndef test_an_unsound_file(): ...\n", 3),
        ("x = 1\n# a line a step\n", 2),
    ],
)
def test_phrases_that_are_not_used(source: str, line: int, tmp_path: Path) -> None:
    violations = phrase_violations(write(tmp_path, source))
    assert [violation.line for violation in violations] == [line]


@pytest.mark.parametrize(
    "source",
    [
        'x = f"{answers} of {len(answers)}, {{x}}, {answers:{answers}}"\n',
        "x = [answers, 'a', 'nswer']\n",
        "# data\nx = 1\n# set\n",
        'x = ["data ", "set"]\n',
        "# amended, soundness, resounding, a dataset\n",
    ],
)
def test_code_and_other_words_are_not_phrases(source: str, tmp_path: Path) -> None:
    assert phrase_violations(write(tmp_path, source)) == []


SILENT = '''
def planted(x):
    """Do it."""
    if x:
        raise ValueError("x")


class Planted:
    async def method(self):
        raise KeyError
'''
EXPLICIT = '''
def in_a_section(x):
    """Do it.

    Raises:
        ValueError: always.
    """
    raise ValueError("x")


def in_a_sentence(x):
    """Do it; KeyError if it is not there."""
    raise KeyError(x)


def passes_on():
    try:
        in_a_sentence(1)
    except KeyError:
        raise


def with_another_within():
    def inner():
        """Always raises ValueError."""
        raise ValueError

    return inner
'''


def test_functions_that_raise_and_do_not_say_so(tmp_path: Path) -> None:
    violations = silent_raises(write(tmp_path, SILENT))
    assert [(v.line, v.what.split()[0]) for v in violations] == [(2, "planted"), (9, "method")]
    assert silent_raises(write(tmp_path, EXPLICIT)) == []


def lines_of_code(count: int, prefix: str) -> str:
    return "".join(f"{prefix}_{number} = {number}\n" for number in range(count))


@pytest.mark.parametrize(("count", "expected"), [(RUN - 1, 0), (RUN, RUN), (RUN + 2, RUN + 2)])
def test_repetitions_across_files(count: int, expected: int, tmp_path: Path) -> None:
    same = lines_of_code(count, "same")
    indented = "def f():\n" + "".join(f"    {line}\n\n" for line in same.splitlines())
    one = write(tmp_path, lines_of_code(9, "one") + same, "one.py")
    two = write(tmp_path, "# no code\n" + indented + lines_of_code(9, "two"), "two.py")
    violations = repeated([one, two])
    assert [v.line for v in violations if v.path == str(one)] == [10 + n for n in range(expected)]
    assert [v.line for v in violations if v.path == str(two)] == [
        3 + 2 * n for n in range(expected)
    ]
    if expected:
        assert violations[0] == (str(one), 10, f"also at {two}:3")
        assert violations[-1].what == f"also at {one}:{9 + expected}"


def test_repetitions_within_a_file(tmp_path: Path) -> None:
    same = lines_of_code(RUN, "same")
    path = write(tmp_path, same + "x_y = 1\n" + same)
    assert len(repeated([path])) == 2 * RUN


def test_a_repetition_planted_in_the_package_is_noticed(tmp_path: Path) -> None:
    """A function of the package, copied under another name and indented."""
    original = RULES.parents[1] / "mlx_simpo" / "files.py"
    source = original.read_text("utf-8").splitlines()
    start = next(n for n, line in enumerate(source) if line.startswith("def save_safetensors"))
    body = "\n".join("    " + line for line in source[start : start + 14])
    copy = write(tmp_path, f"class Copy:\n{body}\n")
    files = [*python_files(["mlx_simpo"]), copy]
    assert sum(violation.path == str(copy) for violation in repeated(files)) >= RUN


def test_imports_comments_and_brackets_are_not_lines_of_code(tmp_path: Path) -> None:
    source = "# a comment\nfrom os import (\n    path,\n    sep,\n)\n\nfrom_hf(\n    1234,\n)\n"
    assert code_lines(write(tmp_path, source)) == [(7, "from_hf("), (8, "1234,")]


def test_long_modules(tmp_path: Path) -> None:
    short = write(tmp_path, "x = 1\n" * 300, "short.py")
    long = write(tmp_path, "x = 1\n" * 301, "long.py")
    assert long_modules([short, long]) == [(str(long), 301, "the file has 301 lines")]


def test_instructions_to_tools_are_not_comments(tmp_path: Path) -> None:
    source = (
        "# a reason\nx = 1  # another\n\ny = 1  # type: ignore[x]\nz = '# no comment'  # noqa\n"
    )
    assert comment_share([write(tmp_path, source)]) == 0.5


def test_exceptions_are_allowed_by_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "found = 1\nmade = 1  # a data set\n")
    monkeypatch.setitem(house_rules.ALLOWED, str(path), {"found", r"data sets?\b"})
    assert [v.what.split()[0] for v in word_violations(path)] == ["made"]
    assert phrase_violations(path) == []


def test_files_and_folders_are_taken_once() -> None:
    assert python_files(["tests/house_rules.py", "tests"]).count(RULES) == 1
    with pytest.raises(FileNotFoundError, match="nowhere"):
        python_files(["nowhere"])


def run_rules(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RULES), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_people_read_counts_and_positions() -> None:
    ran = run_rules("--list", "tests/house_rules.py", "tests/test_house_rules.py")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines() == [
        "names with a word that is not used: 0",
        "texts with a phrase that is not used: 0",
        "functions that raise and do not say so: 0",
        "modules of more than 300 lines: 0",
        "repeated lines: 0",
    ]


def test_people_are_told_of_a_path_that_does_not_exist() -> None:
    ran = run_rules("nowhere")
    assert ran.returncode == 2
    assert "nowhere" in ran.stderr
