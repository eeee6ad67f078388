"""Local files: formats, encodings, and the sentence that each mistake gets."""

import csv
import gzip
import io
import json
import random

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from tess.data.rows import Example, load_rows, load_texts
from tess.errors import UserError

ROWS = [
    {"source": "A café, naïvely: 東京\u2028still one line.", "target": "Tokyo café."},
    {"source": 'She said "no", twice.', "target": "She said no\ntwice."},
]
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
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


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".tsv", ".txt"])
def test_a_byte_order_mark_reaches_no_text_and_no_column_name(tmp_path, encoding, ending):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    path = tmp_path / f"a{ending}"
    if ending == ".txt":
        path.write_bytes(f"{mark}First.\n\ufeffSecond, of a file behind it.\n".encode(encoding))
        assert load_texts(path) == ["First.", "Second, of a file behind it."]
        return
    text = as_jsonl().decode()
    if ending != ".jsonl":
        write_csv(path, "," if ending == ".csv" else "\t")
        text = path.read_bytes().decode()
    path.write_bytes((mark + text).encode(encoding))
    assert load_rows(path) == EXAMPLES


def test_a_byte_order_mark_that_another_program_put_into_the_data_is_taken_out(tmp_path):
    row = {"\ufeffsource": "\ufeffA text.", "target": ["\ufeffOne.", "Two."]}
    (tmp_path / "a.jsonl").write_bytes(as_jsonl([row]))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert load_rows(tmp_path / name) == [Example("A text.", ("One.", "Two."))]


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_a_quote_mark_that_opens_a_field_and_does_not_close_is_text(tmp_path, delimiter):
    rows = [
        ("source", "target"),
        ('"Hello he said.', "Hi."),
        ("plain", "text"),
        ('5" of "rain"', '"It rained" a lot'),
        ('"', "a mark"),
        ("quoted", '"all of it"'),
        ('and closed at the end"', 'so"'),
    ]
    path = tmp_path / ("a.csv" if delimiter == "," else "a.tsv")
    path.write_text("".join(delimiter.join(row) + "\r\n" for row in rows))
    want = [Example(source, (target,)) for source, target in rows[1:]]
    want[4] = Example("quoted", ("all of it",))
    assert load_rows(path) == want


def test_a_stray_pair_of_quote_marks_in_a_tsv_swallows_no_rows(tmp_path):
    lines = ["source\ttarget", '"Hello\tHi', "A\tB", 'World"\tX']
    (tmp_path / "a.tsv").write_text("\n".join(lines))
    assert [row.source for row in load_rows(tmp_path / "a.tsv")] == ['"Hello', "A", 'World"']
    (tmp_path / "a.csv").write_text("\n".join(lines).replace("\t", ","))
    with pytest.raises(UserError, match="line 2: the quote mark that opens here closes 2 lines"):
        load_rows(tmp_path / "a.csv")


@pytest.mark.parametrize("delimiter", [",", "\t"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_what_a_csv_writer_wrote_comes_back_with_its_line_ends(tmp_path, delimiter, quoting, ends):
    rng = random.Random(0)
    pieces = ['"', "\n", "\r\n", ", ", "a", "b ", "\t", "ü", "'"]
    rows = [["x" + "".join(rng.choices(pieces, k=9)) for _ in range(2)] for _ in range(200)]
    if delimiter == "\t":  # a field with both is what tells a TSV that swallowed rows
        rows = [[text.replace("\t", " ") for text in row] for row in rows]
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=ends).writerows(
        [["source", "target"], *rows]
    )
    path = tmp_path / ("a.csv" if delimiter == "," else "a.tsv")
    path.write_bytes(file.getvalue().encode())
    assert load_rows(path) == [Example(source, (target,)) for source, target in rows]


def test_as_many_rows_come_out_of_plain_lines_as_go_in_wherever_quote_marks_stand(tmp_path):
    rng = random.Random(1)
    for trial in range(300):
        texts = ["".join(rng.choices('"" ab', k=rng.randint(1, 4))) for _ in range(12)]
        texts = [text if text.strip(' "') else "x" for text in texts]
        lines = [f"{a}\t{b}" for a, b in zip(texts[::2], texts[1::2], strict=True)]
        path = tmp_path / f"{trial}.tsv"
        path.write_text("\n".join(["source\ttarget", *lines]))
        got = [text for row in load_rows(path) for text in (row.source, row.target)]
        whole = [text[1:-1].replace('""', '"') if text[0] == text[-1] == '"' else text
                 for text in texts]  # fmt: skip
        assert len(got) == 12
        assert all(g in (t, w) for g, t, w in zip(got, texts, whole, strict=True)), lines


def test_lines_of_an_old_mac_are_lines(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"source,target\ra,b\rc,d\r")
    assert load_rows(tmp_path / "a.csv") == [Example("a", ("b",)), Example("c", ("d",))]


def test_a_text_or_a_list_of_texts_comes_back_from_the_parquet_that_datasets_writes(tmp_path):
    rows = [
        {"source": "a", "target": "one text"},
        {"source": "b", "target": ["a text", 'an"other']},
        {"source": "c", "target": "[1] a text"},
    ]
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    table.to_parquet(tmp_path / "a.parquet")
    schema = pyarrow.parquet.read_schema(tmp_path / "a.parquet")
    assert str(schema.field("target").type) == "extension<arrow.json>"
    want = [Example("a", ("one text",)), Example("b", ("a text", 'an"other'))]
    want.append(Example("c", ("[1] a text",)))
    assert load_rows(tmp_path / "a.parquet") == want

    # the same strings in a column of another type are texts, unless the metadata says Json
    targets = [json.dumps(row["target"]) for row in rows]
    strings = pyarrow.table({"source": list("abc"), "target": targets})
    pyarrow.parquet.write_table(strings, tmp_path / "strings.parquet")
    got = load_rows(tmp_path / "strings.parquet")
    assert [row.target for row in got] == targets
    named = strings.replace_schema_metadata(schema.metadata)
    pyarrow.parquet.write_table(named, tmp_path / "named.parquet")
    assert load_rows(tmp_path / "named.parquet") == want

    broken = pyarrow.table({"source": ["a"], "target": ["no JSON"]}, metadata=schema.metadata)
    pyarrow.parquet.write_table(broken, tmp_path / "broken.parquet")
    with pytest.raises(UserError, match="row 1: 'target' should be JSON"):
        load_rows(tmp_path / "broken.parquet")


def test_a_parquet_column_that_is_not_asked_for_is_not_read(tmp_path):
    nanoseconds = pyarrow.array([1], pyarrow.timestamp("ns"))  # no Python datetime holds them
    table = pyarrow.table({"source": ["a"], "target": ["b"], "time": nanoseconds})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert load_rows(tmp_path / "a.parquet") == [Example("a", ("b",))]
    twice = pyarrow.Table.from_arrays([["a"], ["b"], ["c"]], ["source", "target", "source"])
    pyarrow.parquet.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(UserError, match="'source' is there twice"):
        load_rows(tmp_path / "twice.parquet")


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
        ("a.csv", b"source,target\na,b\n\nc,d,e\n", ["line 4", "2 fields", "found 3"]),
        ("a.csv", b'source,target\na,"b, c\n', ["line 2", "2 fields", "found 3"]),
        ("a.csv", b'source,target\n"a\nb",c\nd,"e', ["line 2", "found 1", "breaks at line 4"]),
        ("a.csv", b"source,target,source\na,b,c\n", ["line 1", "'source' is there twice"]),
        ("a.csv", b'text\n"a\nb"\n', ["line 2", "1 lines below", "a row by itself"]),
        ("a.csv", "source,target\na,b\n".encode("utf-16-le"), ["line 1", "zero byte", "UTF-16"]),
        ("a.tsv", "source\ttarget\n".encode("utf-16") + b"a", ["UTF-16", "found other bytes"]),
        ("a.csv", gzip.compress(b"source,target\na,b\n"), ["a gzip file", ".gz"]),
        ("a.csv.gz", b"", ["not a whole gzip file", "empty"]),
        ("a.csv.gz", LFS_POINTER, ["Git LFS pointer"]),
        ("a.jsonl", LFS_POINTER, ["Git LFS pointer", "git lfs pull"]),
        ("a.parquet", LFS_POINTER, ["Git LFS pointer"]),
        ("a.jsonl", b'{"source": "a", "target": "b", "source": "c"}', ["line 1", "'source' is t"]),
        ("a.jsonl", b'{"source": "a", "target": "b", "m": {"k": 1, "k": 2}}', ["'k' is there"]),
        ("a.jsonl", '{"source": "\u200b\ufeff", "target": "b"}'.encode(), ["'source'", "only bl"]),
        ("a.jsonl", b'{"source": "a", "target": ' + b"[" * 100_000 + b"\n", ["line 1"]),
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
