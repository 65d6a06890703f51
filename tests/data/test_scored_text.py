"""The golden file that shows what is scored with each template is what the package does."""

from golden.make_scored_text import FILE, content_of_file


def test_the_golden_file_is_up_to_date() -> None:
    """After a change on purpose: PYTHONPATH=.:tests python -m golden.make_scored_text, and read
    what changed."""
    assert FILE.read_text(encoding="utf-8") == content_of_file()
