"""CSV and TSV: lines of fields, in which a quote mark is a quote only where it is closed again.

Two kinds of files have these endings, and neither says which it is: tables by a program that
quotes (RFC 4180), whose quoted fields may hold line ends, and plain lines, in which `"` is text.
A file is read as the first if it is that from its first to its last line:

- a field that begins with a quote mark ends with one, directly before a delimiter or line end, and
  has only doubled ones inside; no other field has any;
- every record has as many fields as the header;
- in a TSV, no field holds both tabs and line ends: one with both has swallowed rows.

Any other file is read line by line: a field that opens and closes on its line is unquoted, every
other mark is text, and rows are never merged. A file of which both readings hold, with another
number of rows, is refused, as is a line with too few or too many fields.
"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from tess.errors import UserError


class Row(NamedTuple):
    """The line it begins on, from 1; how many lines it takes; its fields."""

    line: int
    lines: int
    fields: list[str]


class _Broken(Exception):
    """The line at which a file stops being a quoted table."""


def read_delimited(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(line number, {column: field}) of each row below the header; blank lines are skipped.

    Raises:
        UserError: a line with another number of fields than the header, a column that the header
            names twice, or quotes that can be read in two ways.
    """
    try:
        rows = list(_quoted_rows(text, delimiter))
    except _Broken as error:
        rows = list(_line_rows(text, delimiter, path, error.args[0]))
    else:
        _refuse_two_readings(rows, text, delimiter, path)
    if not rows:
        return
    header = rows[0].fields
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise UserError(f"{path}, line {rows[0].line}: the column {twice[0]!r} is there twice")
    for row in rows[1:]:
        yield row.line, dict(zip(header, row.fields, strict=True))


@cache
def _table_field(delimiter: str) -> re.Pattern[str]:
    """A field of a quoted table and what ends it."""
    quoted, plain = r'"((?:[^"]++|"")*+)"', rf'([^"\r\n{delimiter}]*+)'
    return re.compile(rf"(?:{quoted}|{plain})({delimiter}|\r?\n|\Z)")


@cache
def _line_field(delimiter: str) -> re.Pattern[str]:
    """The same within one line, where a quote mark that is not closed is text."""
    quoted, plain = r'"((?:[^"]++|"")*+)"', rf"([^{delimiter}]*+)"
    return re.compile(rf"(?:{quoted}|{plain})({delimiter}|\Z)")


def _quoted_rows(text: str, delimiter: str) -> Iterator[Row]:
    field, at, first, lines, fields, width = _table_field(delimiter), 0, 1, 1, [], 0
    while at < len(text) or fields:
        match = field.match(text, at)
        quoted = match and match[1]
        if not match or delimiter == "\t" and quoted and "\t" in quoted and "\n" in quoted:
            raise _Broken(first + lines - 1)
        fields.append(match[2] if quoted is None else quoted.replace('""', '"'))
        lines += (quoted or "").count("\n")
        at = match.end()
        if match[3] == delimiter:
            continue
        if fields != [""] or quoted is not None:
            width = width or len(fields)
            if len(fields) != width:
                raise _Broken(first)
            yield Row(first, lines, fields)
        first, lines, fields = first + lines, 1, []


def _line_rows(text: str, delimiter: str, path: Path, broken: int) -> Iterator[Row]:
    width = 0
    for number, line in enumerate(text.split("\n"), start=1):
        if not (line := line.removesuffix("\r")):
            continue
        fields = _fields(line, delimiter, width)
        width = width or len(fields)
        if len(fields) != width:
            hint = f"; as a quoted table the file breaks at line {broken}"
            raise UserError(
                f"{path}, line {number}: expected {width} fields as in the header, "
                f"found {len(fields)}{hint if broken != number else ''}"
            )
        yield Row(number, 1, fields)


def _fields(line: str, delimiter: str, width: int) -> list[str]:
    """The fields of a line; all its quote marks are text where that alone gives `width` of them."""
    fields, at, field = [], 0, _line_field(delimiter)
    ended = False
    while not ended:
        match = field.match(line, at)
        fields.append(match[2] if match[1] is None else match[1].replace('""', '"'))
        at, ended = match.end(), not match[3]
    plain = line.split(delimiter)
    return plain if len(fields) != width and len(plain) == width else fields


def _refuse_two_readings(rows: list[Row], text: str, delimiter: str, path: Path) -> None:
    """Raises UserError if some row has several lines, and every line of the file is a row too."""
    if not (long := [row for row in rows if row.lines > 1]):
        return
    try:
        list(_line_rows(text, delimiter, path, 0))
    except UserError:
        return
    raise UserError(
        f"{path}, line {long[0].line}: the quote mark that opens here closes {long[0].lines - 1} "
        "lines below, and each of these lines is a row by itself; double the quote marks that are "
        "text and put such fields in quotes, or write the rows as JSONL"
    )
