"""Sentence boundaries by rule: no model and nothing to download.

A sentence ends at a line end, and at `.`, `!` or `?` (with closing quotes or brackets) that is
followed by a blank and then by something that can begin a sentence. A full stop after an initial
("J. Smith") or one of a few abbreviations does not end it. Good enough to score ROUGE-Lsum and to
find the sentence of an answer; it is tuned to English.
"""

import re

_END = re.compile(r"""[.!?]+["'”’)\]]*(?=\s+["'“‘(\[]*[A-Z0-9])|\n+""")
_ABBREVIATION = re.compile(
    r"\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|etc|e\.g|i\.e|cf|Fig|No|Inc|Ltd|Co|Gen|Col|Lt|Sgt)\.$"
)


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """(start, end) offsets of the sentences of `text`, in order, without blanks around them."""
    spans, start = [], 0
    for match in _END.finditer(text):
        if not _ABBREVIATION.search(text, start, match.end()):
            spans.append((start, match.end()))
            start = match.end()
    spans.append((start, len(text)))
    return [span for span in (_trim(text, *span) for span in spans) if span[0] < span[1]]


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`."""
    return [text[start:end] for start, end in sentence_spans(text)]


def sentence_around(text: str, offset: int) -> str:
    """The sentence of `text` that holds the character at `offset` (or the next one after it)."""
    spans = sentence_spans(text)
    start, end = next((span for span in spans if offset < span[1]), spans[-1] if spans else (0, 0))
    return text[start:end]


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    while start < end and text[start].isspace():
        start += 1
    while start < end and text[end - 1].isspace():
        end -= 1
    return start, end
