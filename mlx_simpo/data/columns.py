"""Columns of a source under our names: data.columns applied, and data that nothing can read.

This is the one place where names are mapped, before `records` sees a row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..errors import SimPOError
from .forms import Form, is_whole_conversation, read_form
from .guesses import mapping_line
from .rows import InvalidRecordError, Row, Source, without_nulls

COLUMNS = ("prompt", "chosen", "rejected", "system", "tools")
# Records that are looked at for the note on how they are read.
_SAMPLE_ROWS = 100
_MAX_NAMES = 40


def with_our_names(source: Source, columns: Mapping[str, str] | None) -> Source:
    """Return a source whose rows have our names for the columns that ``columns`` maps.

    Args:
        source: its rows are as in the data, with all columns of each record, nulls included.
        columns: {our name: its name in the data}.

    Raises:
        SimPOError: an unknown name of ours; a column that the data lacks; data without a record
            whose columns are recognized; or data that cannot be read.
    """
    columns = dict(columns or {})
    for ours in columns:
        if ours not in COLUMNS:
            raise SimPOError(
                f"data.columns has {ours!r}; it names the columns for {', '.join(COLUMNS)}, as in "
                "{prompt: question}"
            )
    if len(set(columns.values())) < len(columns):
        raise SimPOError(f"data.columns uses one column for two names: {columns}")
    note = _look(source, columns)

    def rows() -> Iterator[Row]:
        for number, row in enumerate(source.rows()):
            yield our_row(row, columns)._replace(number=number)

    labels = tuple(f"{ours}={theirs}" for ours, theirs in sorted(columns.items()))
    return replace(source, rows=rows, labels=(*source.labels, *labels), note=note)


def our_row(row: Row, columns: Mapping[str, str]) -> Row:
    """Return a row with our names for the columns that ``columns`` maps, and without nulls."""
    try:
        return row._replace(value=_renamed(row.value, columns))
    except RecursionError as error:
        return row._replace(value=None, problem=str(error))


def _renamed(value: Any, columns: Mapping[str, str]) -> Any:
    """Return a record with our names and without nulls; anything else as it is."""
    if not columns or not isinstance(value, dict):
        return without_nulls(value)
    mapped = {ours: value.get(theirs) for ours, theirs in columns.items()}
    # Once the prompt is named, other columns of prompts are not ambiguous but ignored.
    is_other = "prompt" not in columns
    other = {
        name: content
        for name, content in value.items()
        if name not in columns.values() and (is_other or name in COLUMNS)
    }
    return without_nulls({**other, **mapped})


def _look(source: Source, columns: Mapping[str, str]) -> str | None:
    """Look at records until one is recognized and all columns of ``columns`` have appeared.

    Returns:
        A note on the forms of the first records.

    Raises:
        SimPOError: no record is recognized, or a column is not in the data.
    """
    names: dict[str, Any] = {}  # with the first value that is not null
    forms: dict[Form | None, None] = {}
    problem, has_system, is_recognized, num_records = "", False, False, 0
    missing = set(columns.values())
    for row in source.rows():
        renamed = our_row(row, columns).value
        if not isinstance(renamed, dict):
            continue
        num_records += 1
        for name, value in row.value.items():
            if names.get(name) is None:
                names[name] = value
        missing -= row.value.keys()
        try:
            record, form = read_form(renamed)
            if is_known(record):
                is_recognized = True
                forms[form] = None
                has_system |= bool(record.get("system"))
        except InvalidRecordError as error:
            problem = problem or ": ".join(error.args)
            # Its columns were recognized, but not what is in them.
            is_recognized |= error.args[0] != "ambiguous columns"
        if num_records >= _SAMPLE_ROWS and is_recognized and not missing:
            break
    if num_records and missing:
        theirs = next(theirs for theirs in columns.values() if theirs in missing)
        ours = next(ours for ours, name in columns.items() if name == theirs)
        raise SimPOError(
            f"{source.name} has no column {theirs!r}, which data.columns names for {ours}; "
            f"{_columns_and_remedy(names)}"
        )
    if num_records and not is_recognized:
        what = problem or "no record has columns that are recognized as prompt, chosen and rejected"
        raise SimPOError(f"{source.name}: {what}; {_columns_and_remedy(names)}")
    return _note(source.name, forms, has_system)


def is_known(record: Mapping[str, Any]) -> bool:
    """Return whether a record, as `read_form` returns it, has columns that `records` can judge."""
    if "completion" in record and "label" in record:
        return True  # records for KTO have a reason of their own
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if chosen is None or rejected is None:
        return False
    if record.get("prompt") is not None or is_whole_conversation(chosen):
        return True
    return not isinstance(chosen, list)


def _columns_and_remedy(names: Mapping[str, Any]) -> str:
    """Return which columns there are, and how they are mapped."""
    # A header may have line breaks in a name.
    shown = [n if n.isprintable() else repr(n) for n in names][:_MAX_NAMES]
    more = ", …" if len(names) > len(shown) else ""
    guess = mapping_line(names)
    remedy = guess[1] if guess else "data.columns={prompt: …, chosen: …, rejected: …}"
    names_it = "name them, perhaps with" if "…" not in remedy else "name them in"
    return (
        f"it has {', '.join(shown)}{more}; {names_it} {remedy} (docs/data.md has every accepted "
        "form)"
    )


def _note(name: str, forms: Mapping[Form | None, None], has_system: bool) -> str | None:
    """Return the note on the forms that were read; None if all is as the names say."""
    parts = []
    for form in forms:
        if form is not None:
            prompt = f"prompt from {' and '.join(form.prompt)}, " if form.prompt else ""
            parts.append(f"{form.name} ({prompt}responses from {' and '.join(form.responses)})")
    notes = [f"{name} is read as {', '.join(parts)}"] if parts else []
    if has_system:
        notes.append(f"the system column{'' if parts else f' of {name}'} becomes the first turn")
    return "; ".join(notes) or None
