"""A CSV file that grows row by row; each row is written at once, and after a crash the file is still readable."""

import csv
import io
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to the file. New keys become new columns; lists and mappings are written as JSON."""
    columns, known = _columns(path), read(path)
    if new := [name for name in row if name not in columns]:
        columns += new
        _replace(path, columns, known)
    elif not path.read_text(encoding="utf-8").endswith("\n"):
        _replace(path, columns, known)  # the last row was cut short by a crash
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(_lines(columns, [row]))


def read(path: Path) -> list[dict[str, str]]:
    """All complete rows, with "" where a row has no value; [] if there is no file."""
    if not path.exists():
        return []
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
    return list(csv.DictReader(io.StringIO(complete)))


def drop(path: Path, column: str, value: str) -> None:
    """Remove the rows that have this value in the column."""
    rows = read(path)
    kept = [row for row in rows if row.get(column) != value]
    if len(kept) < len(rows):
        _replace(path, _columns(path), kept)


def markdown(rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> str:
    """The rows as a Markdown table of these columns, without columns that are empty in every row."""
    rows = list(rows)
    shown = [name for name in columns if any(row.get(name) not in (None, "") for row in rows)]
    lines = [shown, ["---"] * len(shown), *([_cell(row.get(name)) for name in shown] for row in rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _columns(path: Path) -> list[str]:
    if not path.exists():
        return []
    header, newline, _ = path.read_text(encoding="utf-8").partition("\n")
    return next(csv.reader([header]), []) if newline else []


def _replace(path: Path, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the complete file again; if that is interrupted, the old file stays."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    temporary.write_text(_lines(columns, [dict(zip(columns, columns, strict=True)), *rows]), encoding="utf-8")
    os.replace(temporary, path)


def _lines(columns: list[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(
        {name: _cell(value) for name, value in row.items()} for row in rows
    )
    return text.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple | dict):
        return json.dumps(value)
    # A row is one line, so that a crash can damage the last line only.
    return "" if value is None else " ".join(str(value).splitlines())
