"""Local files: formats, encodings, and the sentence that each mistake gets."""

import csv
import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from tess.data.rows import Example, load_rows, load_texts
from tess.errors import UserError

ROWS = [
    {"source": "A café, naïvely: 東京\u2028still one line.", "target": "Tokyo café."},
    {"source": 'She said "no", twice.', "target": "She said no\ntwice."},
]
EXAMPLES = [Example(row["source"], (row["target"],)) for row in ROWS]


def as_jsonl(rows=ROWS, newline="\n") -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + newline for r in rows).encode()


def write_csv(path, delimiter=","):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["source", "target"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


def test_every_format_gives_the_same_rows_plain_and_gzipped(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(as_jsonl())
    (tmp_path / "a.ndjson").write_bytes(as_jsonl())
    write_csv(tmp_path / "a.csv")
    write_csv(tmp_path / "a.tsv", "\t")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for plain in list(tmp_path.iterdir()):
        packed = plain.with_name(plain.name + ".gz")
        packed.write_bytes(gzip.compress(plain.read_bytes()))
        assert load_rows(plain) == load_rows(packed) == EXAMPLES, plain.suffix


def test_byte_order_mark_crlf_and_blank_lines_are_no_trouble(tmp_path):
    path = tmp_path / "windows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + as_jsonl(newline="\r\n\r\n"))
    assert load_rows(path) == EXAMPLES
    write_csv(tmp_path / "windows.csv")
    text = (tmp_path / "windows.csv").read_bytes()
    (tmp_path / "windows.csv").write_bytes(b"\xef\xbb\xbf" + text)
    assert load_rows(tmp_path / "windows.csv") == EXAMPLES


def test_a_list_of_targets_is_several_references(tmp_path):
    rows = [{"source": "s", "target": ["one", "two"]}]
    (tmp_path / "a.jsonl").write_bytes(as_jsonl(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        (example,) = load_rows(tmp_path / name)
        assert example.references == ("one", "two")
        assert example.target == "one"


def test_columns_can_have_other_names(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("id,long,short\n1,text,t\n")
    assert load_rows(path, "long", "short") == [Example("text", ("t",))]


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", b'{"source": "a", "target": "b"}\n\n{"source": "a"', ["a.jsonl", "line 3"]),
        ("a.jsonl", b"[1, 2]\n", ["line 1", "object", "list"]),
        ("a.jsonl", b'{"source": "a", "gold": "b"}\n', ["'target'", "['gold', 'source']"]),
        ("a.jsonl", b'{"source": null, "target": "b"}\n', ["line 1", "'source'", "nothing"]),
        ("a.jsonl", b'{"source": 3, "target": "b"}\n', ["'source'", "a int"]),
        ("a.jsonl", b'{"source": " \\t", "target": "b"}\n', ["'source'", "only blanks"]),
        ("a.jsonl", b'{"source": "a", "target": ""}\n', ["'target'", "only blanks"]),
        ("a.jsonl", b'{"source": "a", "target": []}\n', ["'target'", "empty list"]),
        ("a.jsonl", b'{"source": "a", "target": ["b", null]}\n', ["'target'[1]", "nothing"]),
        ("a.jsonl", b'{"source": "\\ud800", "target": "b"}\n', ["line 1", "surrogate"]),
        ("a.jsonl", b'{"source": "a", "target": "b"}\n\xff\n', ["line 2", "UTF-8"]),
        ("a.jsonl", b"\n", ["at least one row"]),
        ("a.jsonl.gz", b"not gzip", ["a.jsonl.gz", "gzip"]),
        ("a.jsonl.gz", gzip.compress(b"x" * 999)[:-9], ["gzip"]),
        ("a.jsonl.gz", gzip.compress(b"x" * 999)[:10] + b"\xff" * 20, ["gzip"]),
        ("a.csv", b"source,target\na,b\nc\n", ["line 3", "2 fields", "found 1"]),
        ("a.csv", b'source,target\na,"b\n', ["line 2", "CSV"]),
        ("a.csv", b"source;target\na;b\n", ["'source'", "source;target"]),
        ("a.csv", b"", ["at least one row"]),
        ("a.parquet", b"no parquet", ["a.parquet", "Parquet"]),
        ("a.xml", b"<a/>", ["a.xml", ".jsonl", ".parquet"]),
    ],
)
def test_a_broken_file_gets_one_sentence_that_says_where_and_what(tmp_path, name, content, parts):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        load_rows(tmp_path / name)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_file_and_a_folder_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        load_rows(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="is a folder"):
        load_rows(tmp_path)


def test_raw_text_comes_from_lines_or_from_a_column(tmp_path):
    texts = ["First text.", "Second, with 東京."]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n\n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([{"text": t, "id": 1} for t in texts]))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(as_jsonl([{"body": t} for t in texts])))
    assert load_texts(tmp_path / "a.txt") == load_texts(tmp_path / "a.jsonl") == texts
    assert load_texts(tmp_path / "b.jsonl.gz", text_column="body") == texts
    with pytest.raises(UserError, match=r"'text'.*\['body'\]"):
        load_texts(tmp_path / "b.jsonl.gz")
    (tmp_path / "c.txt").write_text("\n")
    with pytest.raises(UserError, match="at least one text"):
        load_texts(tmp_path / "c.txt")
