"""The denoising as data, as a page, and live in a terminal."""

import io
import json
import re

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from tess.errors import UserError
from tess.sampling.steps import StepTrace
from tess.text.token_strings import TokenStrings
from tess.text.tokenization import encode_texts, train_tokenizer
from tess.trace.data import trace_data
from tess.trace.live import LiveDenoising, display_width, fitted, wrapped
from tess.trace.page import as_inline_json, trace_page

PAD, BOS, EOS = 0, 1, 2
HOSTILE = "</script><b onload=x>&\u2028\u202e\x1b[2J\x9b31m"
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the cat sat on the mat, the cat sat"] * 3, 300)


def ids_of(tokenizer, *texts: str, length: int = 12) -> torch.Tensor:
    rows = [[*encode_texts(tokenizer, [text])[0], EOS] for text in texts]
    return torch.tensor([(row + [PAD] * length)[:length] for row in rows])


def make_trace(token_ids: torch.Tensor, time: float = 0.5, probability: float = 0.5, active=None):
    shape = token_ids.shape
    active = [True] * shape[0] if active is None else active
    log_probs = torch.full(shape, probability).log()
    return StepTrace(time, token_ids, log_probs, torch.full(shape, 1.25), torch.tensor(active))


def page_data(page: str):
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert len(found) == 1
    return json.loads(found[0])


def unpacked(page: str) -> list[list[dict]]:
    """The steps of each example, as the page's script reads them."""
    data = page_data(page)
    result = []
    for example in data["examples"]:
        ids, steps = list(example["first"]), []
        for step in example["steps"]:
            for at, id_ in zip(step["changes"][::2], step["changes"][1::2], strict=True):
                ids[at] = id_
            steps.append({**step, "tokens": [data["tokens"][id_] for id_ in ids]})
        result.append(steps)
    return result


# ---- token strings ----------------------------------------------------------------------------


def test_incomplete_bytes_are_shown_one_by_one_and_joined_in_the_text(tokenizer):
    strings = TokenStrings(tokenizer)
    ids = encode_texts(tokenizer, ["é€😀"])[0]
    assert len(ids) == 2 + 3 + 4  # no merges: a token is a byte
    assert [strings.string(id_) for id_ in ids[:2]] == ["⟨C3⟩", "⟨A9⟩"]
    assert strings.pieces(ids) == ["é", "", "€", "", "", "😀", "", "", ""]
    assert strings.pieces(ids[1:4]) == ["⟨A9⟩", "⟨E2⟩", "⟨82⟩"]
    assert strings.pieces([ids[0], EOS, ids[1]]) == ["⟨C3⟩", "</s>", "⟨A9⟩"]


def test_pieces_of_a_printable_text_join_to_the_text(tokenizer):
    text = "the cat, naïve — 日本 sat  on😀 ▁mat"
    assert "".join(TokenStrings(tokenizer).pieces(encode_texts(tokenizer, [text])[0])) == text


def test_every_id_has_a_string_without_control_or_invisible_characters(tokenizer):
    strings = TokenStrings(tokenizer)
    shown = [strings.string(id_) for id_ in range(len(tokenizer) + 1)]
    assert all(shown) and "".join(shown).isprintable()
    assert " " not in "".join(shown[:-1]) and "␣the" in shown  # the last is "⟨id N⟩"
    assert len(set(shown)) == len(shown)


def test_every_byte_is_read_as_itself(tokenizer):
    strings = TokenStrings(tokenizer)
    text = bytes(range(0xA1, 0x100)).decode("latin-1")  # \u00ad, an invisible hyphen, among them
    shown = "".join(strings.pieces(encode_texts(tokenizer, [text])[0]))
    assert shown == text.replace("\xad", "⟨U+00AD⟩")


def test_hostile_characters_become_visible_names(tokenizer):
    text = "a\x1b[2J\x9b\u202e\u2028\u200b\x7f\r\n\tb é"
    shown = "".join(TokenStrings(tokenizer).pieces(encode_texts(tokenizer, [text])[0]))
    assert shown == "a⟨U+001B⟩[2J⟨U+009B⟩⟨U+202E⟩⟨U+2028⟩⟨U+200B⟩⟨U+007F⟩␍↵⇥b é"


@pytest.mark.parametrize(
    "decoder, vocabulary, expected",
    [
        (decoders.WordPiece(), {"un": 2, "##able": 3}, [" un", "able"]),
        (
            decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()]),
            {"▁a": 2, "<0xC3>": 3, "<0xA9>": 4},
            [" a", "é", ""],
        ),
        (decoders.Metaspace(), {"▁a": 2, "<a▁b>": 3}, [" a", "<a▁b>"]),  # the second is special
    ],
)
def test_other_kinds_of_tokenizers_are_read(decoder, vocabulary, expected):
    backend = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, **vocabulary}, unk_token="<pad>"))
    backend.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="</s>",
        mask_token="<a▁b>" if "<a▁b>" in vocabulary else None,
    )
    assert TokenStrings(tokenizer).pieces(sorted(vocabulary.values())) == expected


# ---- data -------------------------------------------------------------------------------------


def test_data_holds_what_the_trace_holds(tokenizer):
    first = ids_of(tokenizer, "the cat", "the mat é")
    second = first.clone()
    second[0, 1] = first[0, 0]
    traces = [make_trace(first, 1.0, 0.25), make_trace(second, 0.5, 0.75, [True, False])]
    traces[0].log_probs[1, 0] = float("-inf")
    data = trace_data(traces, tokenizer, ["s", "t"], ["x", "y"], {"num_inference_steps": 5})
    assert json.loads(json.dumps(data)) == data
    assert data["num_steps"] == 5 and data["special_tokens"] == ["</s>", "<pad>"]
    one, two = data["examples"]
    assert (one["source"], one["text"], one["nfe"], two["nfe"]) == ("s", "x", 2, 1)
    assert [step["time"] for step in one["steps"]] == [1.0, 0.5]
    assert [step["changed"] for step in one["steps"]] == [[], [1]]
    again = trace_data([*traces, traces[1]], tokenizer, ["s", "t"], ["x", "y"], {})
    assert [step["changed"] for step in again["examples"][0]["steps"]] == [[], [1], []]
    assert one["steps"][0]["tokens"][:3] == ["the", "␣cat", "</s>"]
    assert one["steps"][0]["end"] == 2
    assert one["steps"][1]["confidence"] == [0.75] * 12 and one["steps"][1]["entropy"][3] == 1.25
    assert len(two["steps"]) == 1 and two["steps"][0]["confidence"][0] == 0
    at = two["steps"][0]["tokens"].index("⟨C3⟩")
    assert two["steps"][0]["joined"] == [[at, "é"], [at + 1, ""]]


def test_positions_outside_an_examples_canvas_are_left_out(tokenizer):
    traces = [make_trace(ids_of(tokenizer, "the cat sat on", "the"))]
    data = trace_data(traces, tokenizer, ["", ""], ["", ""], {}, lengths=[3, 12], nfe=[4, 8])
    assert [len(e["steps"][0]["tokens"]) for e in data["examples"]] == [3, 12]
    assert data["examples"][0]["steps"][0]["end"] == 3  # no </s> within it
    assert [e["nfe"] for e in data["examples"]] == [4, 8]
    shown = trace_data(traces, tokenizer, ["", ""], None, {}, lengths=[3, 12])["examples"]
    assert [e["text"] for e in shown] == ["the cat sat", "the"]


def test_what_cannot_be_shown_is_refused(tokenizer):
    trace = make_trace(ids_of(tokenizer, "the"))
    with pytest.raises(UserError, match="at least one step"):
        trace_data([], tokenizer, [], [], {})
    with pytest.raises(UserError, match="1 examples, but there are 2 texts"):
        trace_data([trace], tokenizer, ["a"], ["a", "b"], {})
    trace.entropies[0, 2] = float("nan")
    with pytest.raises(UserError, match="step 1 of example 1 .* not numbers"):
        trace_data([trace], tokenizer, ["a"], ["a"], {})


# ---- page -------------------------------------------------------------------------------------


def test_page_gives_back_the_data_it_was_made_of(tokenizer):
    generator = torch.Generator().manual_seed(0)
    traces = [
        make_trace(torch.randint(0, 300, (2, 9), generator=generator), 1 - s / 4, 0.2 * (s + 1))
        for s in range(4)
    ]
    settings = {"seed": 3, "top_p": None}
    data = trace_data(traces, tokenizer, ["a", "b"], ["c", HOSTILE], settings)
    page = trace_page(traces, tokenizer, ["a", "b"], ["c", HOSTILE], settings)
    embedded = page_data(page)
    assert embedded["settings"] == [["seed", "3"]]
    assert [e["text"] for e in embedded["examples"]] == ["c", HOSTILE]
    for example, steps in zip(data["examples"], unpacked(page), strict=True):
        for step, shown in zip(example["steps"], steps, strict=True):
            for name in ("time", "tokens", "joined", "end"):
                assert shown[name] == step[name]
            assert shown["changes"][::2] == step["changed"]
            assert [x / 1000 for x in shown["confidence"]] == pytest.approx(step["confidence"])
            assert [x / 100 for x in shown["entropy"]] == pytest.approx(step["entropy"])
    special = {embedded["tokens"][id_] for id_ in embedded["special"]}
    assert special == set(data["special_tokens"])


def test_no_text_can_break_out_of_the_page(tokenizer):
    trace = make_trace(ids_of(tokenizer, HOSTILE, length=60))
    page = trace_page([trace], tokenizer, [HOSTILE], [HOSTILE], {HOSTILE: HOSTILE})
    plain = trace_page([trace], tokenizer, [""], [""], {})
    for mark in ("<", ">", "\u2028", "\u202e", "\x1b", "\x9b"):
        assert page.count(mark) == plain.count(mark)
    assert page.count("</script>") == 2
    assert as_inline_json("<!--<script>&") == '"\\u003c!--\\u003cscript\\u003e\\u0026"'
    assert page_data(page)["examples"][0]["source"] == HOSTILE


def test_page_needs_nothing_from_outside_and_runs_only_its_own_script(tokenizer):
    page = trace_page([make_trace(ids_of(tokenizer, "the"))], tokenizer, ["a"], ["b"], {})
    assert not re.search(r"https?:|//\w|src=|@import|url\(|innerHTML|insertAdjacent|eval\(", page)
    assert "default-src 'none'" in page and "script-src 'sha256-" in page
    page.encode()


def test_a_large_page_stays_below_three_megabytes(tokenizer):
    generator = torch.Generator().manual_seed(0)  # every token changes in every step: the worst
    traces = []
    for step in range(100):
        trace = make_trace(torch.randint(0, 300, (8, 100), generator=generator), 1 - step / 100)
        trace.log_probs = torch.rand(8, 100, generator=generator).log()
        trace.entropies = 6 * torch.rand(8, 100, generator=generator)
        traces.append(trace)
    assert len(trace_page(traces, tokenizer, ["a"] * 8, ["b"] * 8, {}).encode()) < 3e6


# ---- terminal ---------------------------------------------------------------------------------


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def window(monkeypatch, columns: int = 80, lines: int = 24) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", str(lines))


def screen(written: str, columns: int) -> list[str]:
    """The lines that a terminal shows, by the few sequences that are used."""
    lines, at, column = [""], 0, 0
    for part in re.findall(r"\x1b\[\d*[A-Za-z]|\x1b\[[0-9;]*m|[^\x1b]", written):
        if part == "\n":
            at, column = at + 1, 0
            lines += [""] * (at + 1 - len(lines))
        elif part == "\r":
            column = 0
        elif part.endswith("A") and part.startswith("\x1b"):
            at -= int(part[2:-1])
            assert at >= 0
        elif part == "\x1b[K":
            lines[at] = lines[at][:column]
        elif part == "\x1b[J":
            lines[at:] = [lines[at][:column]]
        elif not part.startswith("\x1b"):
            lines[at] = lines[at][:column] + part + lines[at][column + 1 :]
            column += 1
            assert display_width(lines[at]) < columns
    return lines


def steps_of(tokenizer) -> list[StepTrace]:
    texts = ["the cat sat on the mat, the cat sat", "the cat", "the mat sat"]
    return [
        make_trace(ids_of(tokenizer, text, "on the mat"), 1 - n / 4) for n, text in enumerate(texts)
    ]


def test_terminal_shows_the_last_step_in_place(tokenizer, monkeypatch):
    window(monkeypatch, 24)
    stream = Terminal()
    with LiveDenoising(tokenizer, stream, {}) as live:
        for step, trace in enumerate(steps_of(tokenizer)):
            trace.active[1] = step < 2
            live.update(step, 3, trace)
    lines = screen(stream.getvalue(), 24)
    assert lines[0].startswith("step 3/3  time 0.500")
    assert lines[1:] == ["1   the mat sat</s>", "2 ✓ on the mat</s>", ""]
    assert stream.getvalue().endswith("\n\x1b[J\r\x1b[0m")


def test_a_run_of_padding_in_front_of_the_end_is_counted(tokenizer):
    stream = io.StringIO()
    ids = torch.tensor([[BOS, PAD, PAD, PAD, EOS, PAD]])
    LiveDenoising(tokenizer, stream, {}).update(0, 1, make_trace(ids))
    assert stream.getvalue().endswith("  <s><pad>×3</s>\n")


def test_changed_tokens_are_bold_and_colours_go_by_confidence(tokenizer, monkeypatch):
    window(monkeypatch)
    stream = Terminal()
    live = LiveDenoising(tokenizer, stream, {})
    live.update(0, 2, make_trace(ids_of(tokenizer, "the cat"), probability=0.95))
    assert "\x1b[38" not in stream.getvalue().split("\n", 1)[1]  # the first line is the legend
    live.update(1, 2, make_trace(ids_of(tokenizer, "the mat"), probability=0.1))
    drawn = stream.getvalue().rsplit("\x1b[2A", 1)[1].split("\n", 1)[1]
    assert "\x1b[38;5;166mthe\x1b[0m\x1b[38;5;166m\x1b[1m mat\x1b[0m" in drawn


def test_a_step_that_does_not_follow_begins_below(tokenizer, monkeypatch):
    window(monkeypatch)
    stream = Terminal()
    live = LiveDenoising(tokenizer, stream, {})
    for text in ("the cat", "the mat"):
        live.update(0, 1, make_trace(ids_of(tokenizer, text)))
    assert [line for line in screen(stream.getvalue(), 80) if "</s>" in line] == [
        "the cat</s>",
        "the mat</s>",
    ]
    assert "\x1b[1m mat" not in stream.getvalue()  # nothing to have changed from


def test_a_narrower_window_is_cleared_by_the_rows_that_the_old_lines_take_there(
    tokenizer, monkeypatch
):
    window(monkeypatch, 80)
    stream = Terminal()
    live = LiveDenoising(tokenizer, stream, {})
    trace = make_trace(ids_of(tokenizer, "the cat sat on the mat, the cat sat"))  # 38 columns
    live.update(0, 2, trace)
    header = screen(stream.getvalue(), 80)[0]
    window(monkeypatch, 10)
    live.update(1, 2, trace)
    assert f"\x1b[{-(-len(header) // 10) + 4}A" in stream.getvalue()


@pytest.mark.parametrize("columns, lines", [(80, 5), (12, 6), (4, 3), (30, 10)])
def test_drawing_fits_the_window(tokenizer, monkeypatch, columns, lines):
    window(monkeypatch, columns, lines)
    stream = Terminal()
    texts = ["the cat sat on the mat, 日本日本日本日本", "é" * 4, "the", "on the mat", "mat"] * 2
    live = LiveDenoising(tokenizer, stream, {})
    for step in range(2):
        live.update(step, 2, make_trace(ids_of(tokenizer, *texts, length=40)))
    shown = screen(stream.getvalue(), columns)
    assert len(shown) <= lines  # with the line of the cursor
    assert "…" in "".join(shown)


def test_lines_are_broken_at_spaces_and_lose_nothing():
    spans = [
        ("the", ""),
        (" quick", ""),
        (" bro", ""),
        ("wn", ""),
        (" fox", ""),
        (" " + "x" * 23, ""),
    ]
    lines = ["".join(text for text, _ in line) for line in wrapped(spans, 10)]
    assert lines == ["the quick", "brown fox", "x" * 9, "x" * 10, "xxxx"]
    assert [display_width("".join(t for t, _ in w)) for w in wrapped([("日" * 7, "")], 5)] == [
        4,
        4,
        4,
        2,
    ]


def test_room_is_shared_and_what_is_cut_is_marked():
    blocks = [[[(f"{block}{line}", "")] for line in range(5)] for block in "abc"]
    short = [[[("d0", "")]], blocks[0]]
    text = [["".join(t for t, _ in line) for line in fitted(b, 6)] for b in (blocks, short)]
    assert text[0] == ["a0", "a…", "b0", "b…", "c0", "c…"]
    assert text[1] == ["d0", "a0", "a1", "a2", "a3", "a4"]
    wide = [[[(f"{line}", "")] for line in range(9)], [[("d0", "")]]]
    assert [line[0][0] for line in fitted(wide, 6)][:4] == ["0", "1", "2", "3"]
    assert [line[0][0] for line in fitted(blocks, 2)] == ["a", "… and 2 more"]


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_without_a_terminal_or_colour_there_is_a_plain_line_for_each_step(tokenizer, environment):
    stream = Terminal() if environment else io.StringIO()
    with LiveDenoising(tokenizer, stream, environment) as live:
        for step, trace in enumerate(steps_of(tokenizer)):
            trace.active[1] = step < 1
            live.update(step, 3, trace)
    assert stream.getvalue().splitlines() == [
        "step 1/3  time 1.000  1:  the cat sat on the mat, the cat sat</s>",
        "step 1/3  time 1.000  2:  on the mat</s>",
        "step 2/3  time 0.750  1:  the cat</s>",
        "step 3/3  time 0.500  1:  the mat sat</s>",
    ]
    assert "\x1b" not in stream.getvalue() and "\r" not in stream.getvalue()


@pytest.mark.parametrize("kind", [Terminal, io.StringIO])
def test_no_control_character_of_a_token_reaches_the_stream(tokenizer, monkeypatch, kind):
    window(monkeypatch, 200)
    stream = kind()
    with LiveDenoising(tokenizer, stream, {}) as live:
        live.update(0, 1, make_trace(ids_of(tokenizer, HOSTILE + "\r\n\x07\x00", length=60)))
    rest = ESCAPES.sub("", stream.getvalue()).replace("\n", "").lstrip("\r")
    assert "⟨U+001B⟩[2J⟨U+009B⟩31m␍↵⟨U+0007⟩⟨U+0000⟩" in rest
    assert rest.strip("\r").isprintable()
    allowed = {"K", "J", "m", "A"}
    assert {sequence[-1] for sequence in ESCAPES.findall(stream.getvalue())} <= allowed


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_the_plain_style_and_passes_through(tokenizer, monkeypatch, error):
    window(monkeypatch)

    class Breaking(Terminal):
        def write(self, text: str) -> int:
            if "step 2/3" in text:  # half a drawing, in the middle of a style
                super().write(text[: text.index("\x1b[38") + 4])
                raise error
            return super().write(text)

    stream = Breaking()
    with pytest.raises(error), LiveDenoising(tokenizer, stream, {}) as live:
        for step, trace in enumerate(steps_of(tokenizer)):
            live.update(step, 3, trace)
    assert stream.getvalue().endswith("\x1b[0m\n")
    assert "\x1b[?" not in stream.getvalue()  # no mode to put back, whatever ends the program


def test_a_stream_that_is_gone_does_not_hide_the_error(tokenizer):
    stream = Terminal()
    with pytest.raises(RuntimeError, match="first"), LiveDenoising(tokenizer, stream, {}):
        stream.close()
        raise RuntimeError("first")


def test_a_stream_that_cannot_spell_a_character_gets_a_question_mark(tokenizer):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    live = LiveDenoising(tokenizer, stream, {})
    live.update(0, 1, make_trace(ids_of(tokenizer, "the é")))
    assert raw.getvalue().endswith(b"the ?</s>\n")
