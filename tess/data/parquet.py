"""Parquet files as rows, with columns of JSON decoded.

`datasets` 5 writes a column that mixes texts and lists of texts as JSON: each value is a string in
JSON's spelling, and the column says so by Arrow's type `arrow.json`, or in the file's metadata.
"""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from tess.errors import UserError
from tess.options import unique_keys


def read_parquet(
    data: bytes, path: Path, columns: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """("row 1", {column: value}) of each row, of the named columns alone if all of them are there.

    Raises:
        UserError: no Parquet, a column that is there twice, or a value that is not the JSON that
            its column promises.
    """
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(data))
        names = file.schema_arrow.names
        if twice := [name for name in columns if names.count(name) > 1]:
            raise UserError(f"{path}: the column {twice[0]!r} is there twice")
        table = file.read(list(columns) if set(columns) <= set(names) else None)
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a readable Parquet file: {reason}") from error
    spelled = [name for name in table.column_names if _is_json(table.schema, name)]
    for number, record in enumerate(table.to_pylist(), start=1):
        where = f"row {number}"
        for name in spelled:
            record[name] = _decoded(record[name], f"{path}, {where}: {name!r}")
        yield where, record


def _is_json(schema: pyarrow.Schema, name: str) -> bool:
    """Whether the column, or the lists in it, hold strings in JSON's spelling."""
    field = schema.field(name)
    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])
        feature = json.dumps(metadata["info"]["features"][name])
    except (KeyError, TypeError, ValueError):  # none, or not as `datasets` writes it
        feature = ""
    return "arrow.json" in f"{field.type} {field.metadata}" or '"_type": "Json"' in feature


def _decoded(value: Any, what: str) -> Any:
    if isinstance(value, list):
        return [_decoded(item, what) for item in value]
    if value is None:
        return None
    try:
        return json.loads(value, object_pairs_hook=unique_keys)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{what} should be JSON, as the column's type says: {error}") from error
