"""The denoising of a batch, live in a terminal."""

import contextlib
import math
import os
import shutil
import unicodedata
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import TextIO

from transformers import PreTrainedTokenizerBase

from tess.sampling.steps import StepTrace
from tess.text.end_tokens import before_end, end_tokens
from tess.text.token_strings import TokenStrings

RESET = "\x1b[0m"
# Of the 256 colours; each has a contrast above 3 on black and on white, and colour-blind people
# tell orange, ochre and blue apart.
BANDS = ((0.25, "\x1b[38;5;166m"), (0.5, "\x1b[38;5;136m"), (0.9, "\x1b[38;5;32m"), (2.0, ""))
BOLD, DIM = "\x1b[1m", "\x1b[2m"

Span = tuple[str, str]
"""A visible string and the escape sequences before it."""


class LiveDenoising:
    """Shows the text of every example at each step: in place in a terminal, else line by line.

    In place, colour says how probable a token is and bold which ones changed; what does not fit
    the window is cut. A stream that is no terminal, a dumb one and `NO_COLOR` get a plain line for
    each example and step. No control character of a token reaches the stream.

    No mode of the terminal is ever changed and each drawing ends in the plain style, so that it can
    be used on whatever ends the program; as a context manager it also ends the line.

        with LiveDenoising(tokenizer, sys.stderr) as live:
            live.update(step, num_steps, trace)

    Args:
        stream: where to; progress bars must not write there in the meantime.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stream: TextIO,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._strings = TokenStrings(tokenizer)
        self._ends = end_tokens(tokenizer)
        self._stream = stream
        self._in_place = (
            stream.isatty()
            and not environment.get("NO_COLOR")
            and environment.get("TERM", "") != "dumb"
        )
        self._last_step = -1
        self._last_ids: list[list[int]] = []
        self._drawn: list[int] = []  # the widths of the lines on the screen

    def update(self, step: int, num_steps: int, trace: StepTrace) -> None:
        """Show a step, counted from 0; one that does not follow the last begins a new display."""
        if step <= self._last_step or len(trace.token_ids) != len(self._last_ids):
            self._drawn, self._last_ids = [], []
        texts = [self._spans(trace, row) for row in range(len(trace.token_ids))]
        if self._in_place:
            self._redraw(self._header(step, num_steps, trace), texts, trace.active.tolist())
        else:
            self._print(step, num_steps, trace, texts)
        self._last_step = step
        self._last_ids = trace.token_ids.tolist()

    def close(self) -> None:
        """Leave the cursor below the text, in the plain style; a second call does nothing more."""
        if self._in_place and self._drawn:
            self._drawn = []
            self._write("\r" + RESET)

    def __enter__(self) -> "LiveDenoising":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        if self._in_place:
            # A drawing may have been cut off in the middle. The error on its way out is the one to
            # report, not a stream that is gone.
            with contextlib.suppress(OSError, ValueError):
                self._write(RESET + "\n")
        self._drawn = []

    def _spans(self, trace: StepTrace, row: int) -> list[Span]:
        """The text of an example up to its `</s>`."""
        ids = trace.token_ids[row].tolist()
        count = min(before_end(ids, self._ends) + 1, len(ids))
        before = self._last_ids[row] if self._last_ids else ids
        spans: list[Span] = []
        repeated = 1
        for at, piece in enumerate(self._strings.pieces(ids[:count])):
            if self._strings.is_special(ids[at]):
                repeated = repeated + 1 if at and ids[at] == ids[at - 1] else 1
                if repeated > 1:  # a canvas has long runs of padding
                    spans.pop()
                spans.append((f"{piece}×{repeated}" if repeated > 1 else piece, DIM))
                continue
            probability = math.exp(min(float(trace.log_probs[row, at]), 0.0))
            style = next(color for limit, color in BANDS if probability < limit)
            if ids[at] != before[at]:
                style += BOLD
            spans.append((piece, style))
        return spans

    def _header(self, step: int, num_steps: int, trace: StepTrace) -> list[Span]:
        legend = [("25 %", BANDS[0][1]), ("50 %", BANDS[1][1]), ("90 %", BANDS[2][1])]
        changed = 0
        for row, before in enumerate(self._last_ids):
            ids = trace.token_ids[row].tolist()
            count = before_end(ids, self._ends) + 1
            changed += sum(a != b for a, b in zip(ids[:count], before, strict=False))
        title = f"step {step + 1}/{num_steps}  time {trace.timestep:.3f}  changed {changed:<3}"
        spans = [(title, BOLD), ("  below", DIM)]
        for text, style in legend:
            spans += [(" ", ""), (text, style)]
        return spans

    def _redraw(self, header: list[Span], texts: list[list[Span]], active: list[bool]) -> None:
        width, height = self._size()
        # The last column stays free: terminals differ in what they do after it.
        blocks = [labelled(spans, row, active, width - 1) for row, spans in enumerate(texts)]
        lines = [wrapped(line, width - 1)[0] for line in (header, *fitted(blocks, height - 2))]
        # What was drawn before, in a window that may be narrower by now.
        up = sum(max(1, -(-drawn // width)) for drawn in self._drawn)
        start = f"\x1b[{up}A\r" if up else "\r"
        self._drawn = [sum(display_width(text) for text, _ in line) for line in lines]
        self._write(start + "".join(map(escaped, lines)) + "\x1b[J")

    def _print(self, step: int, num_steps: int, trace: StepTrace, texts: list[list[Span]]) -> None:
        for row, spans in enumerate(texts):
            if bool(trace.active[row]):
                number = f"  {row + 1}:" if len(texts) > 1 else ""
                text = "".join(piece for piece, _ in spans)
                head = f"step {step + 1:>{len(str(num_steps))}}/{num_steps}"
                self._write(f"{head}  time {trace.timestep:.3f}{number}  {text}\n")

    def _size(self) -> tuple[int, int]:
        """Columns and lines of the window, at least 4 and 3."""
        try:
            size = os.get_terminal_size(self._stream.fileno())
        except (OSError, ValueError, AttributeError):
            size = shutil.get_terminal_size()
        if not size.columns or not size.lines:  # a terminal that does not know, as some serial ones
            size = os.terminal_size((80, 24))
        return max(4, size.columns), max(3, size.lines)

    def _write(self, text: str) -> None:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


def labelled(spans: list[Span], row: int, active: list[bool], width: int) -> list[list[Span]]:
    """An example's lines; with its number where there are several, and a tick when it is done."""
    digits = len(str(len(active)))
    if len(active) == 1 or width < 4 * digits + 12:
        return wrapped(spans, width)
    first = f"{row + 1:>{digits}} {' ' if active[row] else '✓'} "
    lines = wrapped(spans, width - len(first))
    return [[(first if n == 0 else " " * len(first), DIM), *line] for n, line in enumerate(lines)]


def display_width(text: str) -> int:
    """Columns of a terminal: 2 for wide characters, 0 for combining ones."""
    return sum(
        0 if unicodedata.category(char) in ("Mn", "Me")
        else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        for char in text
    )


def wrapped(spans: list[Span], width: int) -> list[list[Span]]:
    """Lines of at most `width` columns, broken at spaces; longer words between tokens or within."""
    lines: list[list[Span]] = [[]]
    used = 0
    for word in _words(spans):
        size = sum(display_width(text) for text, _ in word)
        if size <= width < used + size:
            lines.append([])
            used = 0
        for text, style in word:
            text = text.removeprefix(" ") if used == 0 and len(lines) > 1 else text
            for part in _parts(text, width):
                if used + display_width(part) > width:
                    lines.append([])
                    used, part = 0, part.removeprefix(" ")
                lines[-1].append((part, style))
                used += display_width(part)
    return lines


def _words(spans: list[Span]) -> list[list[Span]]:
    words: list[list[Span]] = [[]]
    for text, style in spans:
        if text.startswith(" "):
            words.append([])
        words[-1].append((text, style))
    return words


def _parts(text: str, width: int) -> Iterator[str]:
    """Pieces of at most `width` columns."""
    while display_width(text) > width:
        cut = next(n for n in range(len(text), 0, -1) if display_width(text[:n]) <= width)
        yield text[:cut]
        text = text[cut:]
    yield text


def fitted(blocks: list[list[list[Span]]], height: int) -> list[list[Span]]:
    """As many lines of the blocks as fit, shared evenly; `…` stands for what does not."""
    if sum(map(len, blocks)) <= height:
        return [line for block in blocks for line in block]
    shown, lines = blocks, []
    if len(blocks) > height:
        shown = blocks[: height - 1]
    room = height - (len(shown) < len(blocks))
    for number, block in enumerate(shown):
        waiting = shown[number + 1 :]
        # a block may also use what the ones behind it do not need
        share = room // (1 + len(waiting))
        spare = sum(max(0, share - len(other)) for other in waiting)
        take = min(len(block), share + spare)
        lines += block[:take]
        if take < len(block):
            lines[-1] = [*_shortened(lines[-1]), ("…", DIM)]
        room -= take
    if len(shown) < len(blocks):
        lines.append([(f"… and {len(blocks) - len(shown)} more", DIM)])
    return lines


def _shortened(line: list[Span]) -> list[Span]:
    """The line without its last character, where the `…` goes."""
    line = [span for span in line if span[0]]
    text, style = line[-1]
    return [*line[:-1], (text[:-1], style)]


def escaped(line: list[Span]) -> str:
    """A line as it is written: each token in its style, the rest of the old line erased."""
    text = "".join(f"{style}{text}{RESET}" if style else text for text, style in line)
    return text + "\x1b[K\n"
