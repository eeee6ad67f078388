"""Local files of text pairs or raw text: JSONL, CSV, TSV and Parquet, each plain or gzipped.

A file that cannot be used is an error that names the file, the line and what was expected; no row
is ever dropped in silence. The rules, for `load_rows`:

- `source` must be a string with at least one visible character;
- `target` must be such a string, or a list of them (several references, the first is canonical).
  A blank target is refused too: as a training target it teaches silence, as a reference it gives
  a score that means nothing;
- other columns are ignored; blank lines are skipped; CRLF line ends and any Unicode text are fine;
- UTF-8 is expected, or UTF-16 with a byte-order mark, which never reaches a text or a column name;
- which quote marks of a CSV or TSV are text, `tess.data.delimited` says.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tess.data.delimited import read_delimited
from tess.errors import UserError
from tess.options import decode, read_bytes, unique_keys
from tess.text.visible import is_blank

MARK = "\ufeff"  # the byte-order mark, once it is decoded
FORMATS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
Record = tuple[str, dict[str, Any]]  # ("line 3", {"source": ...})


@dataclass(frozen=True)
class Example:
    """One text pair: a source and one or more acceptable targets."""

    source: str
    references: tuple[str, ...]

    @property
    def target(self) -> str:
        """The canonical target: the first reference."""
        return self.references[0]


def load_rows(
    path: str | Path, source_column: str = "source", target_column: str = "target"
) -> list[Example]:
    """Read text pairs from a JSONL, CSV, TSV or Parquet file (plain or `.gz`).

    Raises:
        UserError: the file is missing, of an unknown kind, empty or broken, lacks a column, or a
            row breaks the rules at the top of this module. The message names file and line.
    """
    rows = []
    for where, record in _read_records(Path(path), (source_column, target_column)):
        at = f"{path}, {where}"
        source = check_text(record[source_column], f"{at}: {source_column!r}")
        rows.append(Example(source, check_references(record[target_column], at, target_column)))
    if not rows:
        raise UserError(f"{path}: expected at least one row, found none")
    return rows


def load_texts(path: str | Path, text_column: str = "text") -> list[str]:
    """Read raw texts for pre-training: a `.txt` file with one text per line (blank lines separate
    and are skipped), or the column `text_column` of any format that `load_rows` reads.

    Raises:
        UserError: as `load_rows`.
    """
    path = Path(path)
    if _kind(path, (*FORMATS, ".txt")) == ".txt":
        texts = [line for _, line in _lines(path)]
    else:
        texts = [
            check_text(record[text_column], f"{path}, {where}: {text_column!r}")
            for where, record in _read_records(path, (text_column,))
        ]
    if not texts:
        raise UserError(f"{path}: expected at least one text, found none")
    return texts


def check_text(value: object, what: str) -> str:
    """`value` if it is a usable text, else a UserError that begins with `what`."""
    if not isinstance(value, str):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise UserError(f"{what} should be a text, found {found}")
    value = value.lstrip(MARK)
    if is_blank(value):
        raise UserError(f"{what} should be a text, found only blanks")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds half of a surrogate pair, which is not text") from error
    return value


def check_references(value: object, at: str, column: str) -> tuple[str, ...]:
    """One text or a non-empty list of texts, as a tuple, else a UserError that begins with `at`."""
    if not isinstance(value, list | tuple):
        return (check_text(value, f"{at}: {column!r}"),)
    if not value:
        raise UserError(f"{at}: {column!r} should hold at least one text, found an empty list")
    return tuple(check_text(v, f"{at}: {column!r}[{i}]") for i, v in enumerate(value))


def _kind(path: Path, known: tuple[str, ...]) -> str:
    """The suffix that says how to read `path`, without `.gz`."""
    if not path.exists():
        raise UserError(f"there is no file {str(path)!r}")
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; expected a file")
    name = path.name.lower().removesuffix(".gz")
    for suffix in known:
        if name.endswith(suffix):
            return suffix
    raise UserError(
        f"cannot tell the format of {str(path)!r} from its name; known endings are "
        f"{', '.join(known)}, each also with .gz"
    )


def _read_records(path: Path, columns: tuple[str, ...]) -> Iterator[Record]:
    """Every record of `path` as (place, dict); each has all of `columns`."""
    kind = _kind(path, FORMATS)
    if kind == ".parquet":
        from tess.data.parquet import read_parquet  # pyarrow takes half a second to load

        records = read_parquet(_read_bytes(path), path, columns)
    elif kind in (".csv", ".tsv"):
        rows = read_delimited(_read_text(path), "," if kind == ".csv" else "\t", path)
        records = ((f"line {number}", record) for number, record in rows)
    else:
        records = _read_jsonl(path)
    for where, record in records:
        record = {name.lstrip(MARK): value for name, value in record.items()}
        if missing := [column for column in columns if column not in record]:
            raise UserError(
                f"{path}, {where}: there is no column {missing[0]!r}; "
                f"the columns there are {sorted(record)}"
            )
        yield where, record


def _read_bytes(path: Path) -> bytes:
    data = read_bytes(path)
    if not path.name.lower().endswith(".gz"):
        if data.startswith(b"\x1f\x8b"):
            raise UserError(f"{path} is a gzip file; expected a name that ends in .gz")
        return data
    try:
        if not data:
            raise EOFError("it is empty")
        return gzip.decompress(data)
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from error


def _read_text(path: Path) -> str:
    return decode(_read_bytes(path), path)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Non-blank lines with their places; only \\n and \\r\\n end a line (U+2028 is text)."""
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not is_blank(line):
            yield f"line {number}", line.strip()


def _read_jsonl(path: Path) -> Iterator[Record]:
    for where, line in _lines(path):
        try:
            record = json.loads(line, object_pairs_hook=unique_keys)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, {where}: expected a JSON object, found other text ({error.msg}, column "
                f"{error.colno}); JSONL has one object on each line"
            ) from error
        except (RecursionError, ValueError) as error:
            raise UserError(f"{path}, {where}: {error}") from error
        if not isinstance(record, dict):
            raise UserError(
                f"{path}, {where}: expected a JSON object, found a {type(record).__name__}"
            )
        yield where, record
