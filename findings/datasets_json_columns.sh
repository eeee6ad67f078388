#!/usr/bin/env bash
# datasets 5.2.0, pyarrow 26.0.1: a column whose values are a text in one row and a list of texts in
# another is stored as JSON. Read back from Parquet by pyarrow each value is JSON source: a text comes
# with quotation marks around it, a list is one string. The text "42" is stored as the number 42.
# Seen 1 December 2026:
#   pyarrow: ['"one text"', '["a","b"]', '42'] (extension<arrow.json>)
#   datasets: ['one text', ['a', 'b'], 42]
set -euo pipefail
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
python3 -m venv "$scratch/venv"
"$scratch/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
cd "$scratch"
"$scratch/venv/bin/python" - <<'PY'
import datasets
import pyarrow.parquet

rows = [{"target": "one text"}, {"target": ["a", "b"]}, {"target": "42"}]
table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
table.to_parquet("rows.parquet")
column = pyarrow.parquet.read_table("rows.parquet").column("target")
print("pyarrow:", column.to_pylist(), f"({column.type})")
print("datasets:", list(datasets.Dataset.from_parquet("rows.parquet")["target"]))
assert column.to_pylist() == ['"one text"', '["a","b"]', '42']
assert list(datasets.Dataset.from_parquet("rows.parquet")["target"])[2] == 42
PY
