"""tess-generate from the inside: lines in, lines out, and where its trace may go."""

import io
import json
import sys

import pytest

from tess.commands import generate
from tess.commands.generate import main, read_lines
from tess.errors import UserError

TEXT = "The museum opened in spring."
QUICK = ["--num_inference_steps", "1"]


@pytest.fixture
def unloaded(monkeypatch):
    """No checkpoint is read: what is refused is refused before."""

    def never(*_, **__):
        raise AssertionError("a checkpoint was loaded")

    monkeypatch.setattr("tess.decoders.load.load_decoder", never)


def lines_of(content: bytes, tmp_path):
    path = tmp_path / "in.txt"
    path.write_bytes(content)
    return read_lines(path)


def test_lines_keep_their_numbers_and_lose_byte_order_marks(tmp_path, capsys):
    mark = "\ufeff".encode()
    assert lines_of(mark + b"a\r\n \t\r\n" + mark + b"b\n\nc", tmp_path) == ["a", "", "b", "", "c"]
    assert "2 of 5 lines of " in (said := capsys.readouterr().err) and "are blank" in said
    assert lines_of(b"a\nb\n", tmp_path) == ["a", "b"] and capsys.readouterr().err == ""
    for content, message in ((mark + b"\n\n", "at least one text"), (b"\xff\xfea", "UTF-8")):
        with pytest.raises(UserError, match=message):
            lines_of(content, tmp_path)


@pytest.mark.parametrize("stdin", [False, True])
def test_a_blank_line_gives_a_blank_line(tmp_path, capsys, monkeypatch, stdin):
    content = ("\ufeff" + TEXT + "\n\n" + TEXT + " It is new.\n").encode()
    path = tmp_path / "in.txt"
    path.write_bytes(content)
    if stdin:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    name = "-" if stdin else str(path)
    assert main(["--input", name, *QUICK]) == 0
    output = capsys.readouterr()
    first, blank, last, summary = output.out.splitlines()
    assert first and blank == "" and last and summary.startswith("[tess]")
    assert f"1 of 3 lines of {name} are blank" in output.err
    main([TEXT, *QUICK])
    assert capsys.readouterr().out.splitlines()[0] == first
    main(["--input", str(path), *QUICK, "--json"])
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["source"] for row in rows] == [TEXT, "", TEXT + " It is new."]
    assert [row["text"] for row in rows] == [first, "", last] and rows[0].keys() == rows[1].keys()


@pytest.mark.parametrize("name", ["no/where/page.html", ".", "n" * 250 + ".html", "/dev/null"])
def test_a_trace_that_cannot_be_written_is_refused_before_the_work(tmp_path, unloaded, name):
    with pytest.raises(UserError, match="cannot write .*: "):
        main([TEXT, "--trace", str(tmp_path / name)])
    assert not any(tmp_path.iterdir())


def test_the_text_is_printed_whatever_happens_to_the_trace(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tess.storage.files.write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        main([TEXT, *QUICK, "--trace", str(tmp_path / "page.html")])
    text, summary = capsys.readouterr().out.splitlines()
    assert text and summary.startswith("[tess]")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--seed", str(2**64)], r"seed must be an integer from -2\^63 to 2\^64 - 1, got 1844"),
        (["--gen_length", "10000000"], "gen_length must be at most 1,048,576"),
        (["--guidance_scale", "inf"], "guidance_scale must be at least 1 .* got inf"),
        (["--no_repeat_ngram", "-1"], "no_repeat_ngram must be at least 1, got -1"),
        (["--forbid", ""], "forbid takes words"),
        (["--temperature", "2"], "temperature 2.0 does nothing without top_p"),
        (["--live", "--batch_size", "4"], "--live writes all texts at once"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_a_checkpoint_is_read(unloaded, flags, message):
    with pytest.raises(UserError, match=message):
        main([TEXT, *flags])


def test_a_template_needs_blanks():
    for template in ("The museum.", "The {x} museum."):
        with pytest.raises(UserError, match="a template with blanks such as .5}, five tokens"):
            main([TEXT, *QUICK, "--template", template])
    assert generate.make_parser().parse_args(["a"]).batch_size is None
